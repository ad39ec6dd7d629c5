"""`python -m bagel_opt.bench.peers` in small on the CPU: our own server and a stand-in for a peer."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from serving import until

import bagel_opt
from bagel_opt.bench import peers, peers_checkpoint, peers_load, peers_requests, peers_rows, peers_servers, peers_tables
from bagel_opt.bench.peers_requests import Answer, MStar, Ours, Work, call_of

STAND_IN = f"{sys.executable} {Path(__file__).parent / 'mstar_stand_in.py'} {{port}} {{hub}}"
END = peers.TINY.special.bos_token_id - 1


@pytest.fixture(autouse=True)
def quick_servers(zygote, monkeypatch):
    """Our own servers need not import torch each."""

    def popen(command, **about):
        return (zygote.popen if command[1:4] == ["-m", "bagel_opt", "serve"] else subprocess.Popen)(command, **about)

    monkeypatch.setattr(peers_servers, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": popen}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return peers_checkpoint.write_checkpoint(tmp_path_factory.mktemp("peers"), peers.TINY, torch.float32)


def test_the_checkpoint_is_read_back_whole(checkpoint):
    found = peers_load.figures(checkpoint)
    assert (
        found["tensors"]
        == found["equal tensors"]
        == len(load_file(checkpoint / "ema.safetensors")) + len(load_file(checkpoint / "ae.safetensors"))
    )
    model = bagel_opt.load(checkpoint, device="cpu")
    assert model.config == peers.TINY
    assert model.tokenizer.largest_id == END + len(peers_checkpoint.ADDED) - 1


def test_a_tensor_that_differs_is_counted(checkpoint, monkeypatch):
    load = bagel_opt.load

    def wrong(folder):
        model = load(folder)
        model.runtime.model.llm.norm_und.weight.data[3] += 1
        return model

    monkeypatch.setattr(peers_load.bagel_opt, "load", wrong)
    found = peers_load.figures(checkpoint)
    assert found["equal tensors"] == found["tensors"] - 1


def test_each_tensor_has_values_of_its_own_and_they_repeat(checkpoint, tmp_path):
    again = peers_checkpoint.write_checkpoint(tmp_path / "again", peers.TINY, torch.float32)
    other = peers_checkpoint.write_checkpoint(tmp_path / "other", peers.TINY, torch.float32, seed=1)
    for file in ("ema.safetensors", "ae.safetensors"):
        assert (checkpoint / file).read_bytes() == (again / file).read_bytes() != (other / file).read_bytes()
    tensors = load_file(checkpoint / "ema.safetensors")
    q, k = (tensors[f"language_model.model.layers.0.self_attn.{x}_proj.weight"] for x in "qo")
    assert not torch.equal(q, k)
    assert 0.9 < q.std() * q.shape[1] ** 0.5 < 1.1
    likely = tensors["language_model.lm_head.weight"].any(dim=1).nonzero().flatten().tolist()
    assert likely == list(range(peers_checkpoint.first_word(), END))  # no others end an answer or have no word


def test_answers_are_words_as_long_as_asked(checkpoint):
    model = bagel_opt.load(checkpoint, device="cpu")
    answers = [model.chat(text, max_think_tokens=21) for text in ("one", "two", "three")]
    ids = [peers_checkpoint.ids_of(text) for text in answers]
    assert [len(found) for found in ids] == [20] * 3
    assert len(set(map(tuple, ids))) == 3
    assert all(peers_checkpoint.first_word() <= number < END for found in ids for number in found)
    assert ["".join(map(peers_checkpoint.word, found)) for found in ids] == answers


@pytest.mark.parametrize("text", ["abc", "abcd efgh1", "ABCD", "abcd, efgh"])
def test_other_texts_are_no_words(text):
    with pytest.raises(ValueError, match="is no word"):
        peers_checkpoint.ids_of(text)


def test_special_tokens_in_another_order_are_refused(tmp_path):
    with pytest.raises(ValueError, match="another order"):
        peers_checkpoint.write_checkpoint(tmp_path, bagel_opt.load(device="cpu").config)


def run(folder, *words):
    small = ("--sizes", "tiny", "--seconds-per-row", "0", "--timeout", "60", "--patience", "120")
    status = peers.main(["--folder", str(folder), *small, *words])
    return status, json.loads((folder / "peers.json").read_text())


@pytest.mark.second
def test_both_servers_answer_all_that_is_asked(tmp_path, capsys):
    rows = ("--rows", "texts,questions,small-pictures,edits,mixture,pictures", "--clients", "1,4,8")
    status, results = run(tmp_path, *rows, "--mstar", STAND_IN)
    assert status == 0
    names = [f"{row} x {n}" for row, many in peers_rows.ROWS.items() for n in many if n in (1, 4, 8)]
    for server in ("ours", "mstar"):
        found = results["servers"][server]
        assert list(found["rows"]) == names
        for name, row in found["rows"].items():
            clients = int(name.split(" x ")[1])
            assert (row["requests"], row["lost"]) == (clients, 0), (server, name, row)
            if name.startswith(("texts", "questions")):
                assert row["tokens"] == 6
                assert 0 < row["first token p50, s"] <= row["p95, s"]
        assert len(found["answers"]) == peers_rows.COMPARED
    ours, theirs = results["servers"].values()
    assert ours["answers"] == theirs["answers"]
    assert "tensors" not in results.get("load", {})
    printed = capsys.readouterr().out
    assert "8 of 8" in printed
    assert "vllm" not in printed


@pytest.mark.second
def test_where_a_peer_differs_and_what_is_in_the_file_stays(tmp_path, capsys):
    status, first = run(tmp_path, "--rows", "texts", "--clients", "1", "--load")
    assert (status, first["load"]["equal tensors"]) == (0, first["load"]["tensors"])
    few = ("--rows", "texts", "--clients", "1")
    again = "again={python} -m bagel_opt serve {checkpoint} --profile {profile} --port {port} --attention sdpa"
    status, results = run(tmp_path, *few, "--no-ours", "--mstar", f"{STAND_IN} --other 3", "--server", again)
    assert status == 0
    assert results["servers"]["ours"] == first["servers"]["ours"]
    assert results["load"] == first["load"]
    own, other, same = (results["servers"][name]["answers"] for name in ("ours", "mstar", "again"))
    assert same == own
    assert peers_rows.first_differences(own, other) == [3] * peers_rows.COMPARED
    assert "0 of 8" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="figures of other work"):
        run(tmp_path, *few, "--tokens", "5")


def test_a_peer_that_does_not_start_is_named_and_the_rows_before_stay(tmp_path, capsys):
    broken = f"{sys.executable} -c 'raise SystemExit(\"no GPU here {{port}}\")'"
    status, results = run(tmp_path, "--rows", "texts", "--clients", "1", "--no-compare", "--mstar", broken)
    assert status == 1
    assert results["servers"]["ours"]["rows"]["texts x 1"]["lost"] == 0
    assert "no GPU here" in results["servers"]["mstar"]["error"]
    assert "ended itself with status 1" in capsys.readouterr().out


def test_a_server_that_is_never_ready_is_ended_with_what_it_started(tmp_path):
    own = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    log, ready = tmp_path / "log", (peers_servers.free_port(), "/health")
    with (
        pytest.raises(RuntimeError, match=r"not ready after 2 s: \d+; all is in"),
        peers_servers.started([sys.executable, "-c", own], *ready, log, 2),
    ):
        pass
    until(lambda: not lives(int(log.read_text().split()[0])))


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.second
def test_a_killed_run_keeps_its_rows_and_leaves_no_server(tmp_path):
    words = ["--folder", str(tmp_path), "--sizes", "tiny", "--rows", "texts", "--clients", "1", "--mstar"]
    waiting = f"{sys.executable} -c 'import os, time; print(os.getpid(), flush=True); time.sleep(99) # {{port}}'"
    run = subprocess.Popen([sys.executable, "-m", "bagel_opt.bench.peers", *words, waiting])
    until(lambda: (log := tmp_path / "mstar.log").exists() and log.read_text().strip(), 100)
    run.terminate()
    assert run.wait(60) == 143
    until(lambda: not lives(int((tmp_path / "mstar.log").read_text().split()[0])))
    assert json.loads((tmp_path / "peers.json").read_text())["servers"]["ours"]["rows"]["texts x 1"]["lost"] == 0


# ---- requests and figures


def test_both_apis_are_asked_for_the_same():
    work = Work(128, 64, 20, 6)
    for row in peers_rows.ROWS:
        for seed in range(10):
            ours, theirs = (call_of(row, dialect, work, seed) for dialect in (Ours(), MStar()))
            assert (ours.path, ours.side) == (theirs.path, theirs.side)
    ours, theirs = (json.loads(call_of("pictures", dialect, work, 3).body) for dialect in (Ours(), MStar()))
    assert (ours.pop("size"), ours.pop("num_timesteps")) == ("128x128", 20)
    assert (theirs.pop("width"), theirs.pop("height")) == (128, 128)
    assert ours == theirs
    ours, theirs = (json.loads(call_of("questions", dialect, work, 3).body) for dialect in (Ours(), MStar()))
    assert ours["messages"] == [{"role": "system", "content": peers_requests.SYSTEM}, *theirs["messages"]]
    assert ours["max_tokens"] == theirs["max_tokens"] == 6
    light = json.loads(call_of("pictures", Ours(), work, 3, light=True).body)
    assert light["num_timesteps"] == peers_requests.LIGHT_STEPS


def test_figures_of_answers():
    good = [Answer(2.0, 1.0, (1, 2, 3)), Answer(4.0, 2.0, (1, 2, 3))]
    row = peers_rows.figures([*good, Answer(9.0, error="500: no")], 10.0)
    assert (row["requests"], row["lost"], row["error"]) == (3, 1, "500: no")
    assert (row["p50, s"], row["p95, s"]) == (3.0, pytest.approx(3.9))
    assert (row["per minute"], row["tokens/s"], row["first token p50, s"]) == (12.0, 0.6, 1.5)
    assert row["token p50, ms"] == 750.0
    assert peers_rows.figures([Answer(9.0, error="no")], 1.0) == {
        "requests": 1,
        "lost": 1,
        "seconds": 1.0,
        "error": "no",
    }


def test_first_differences():
    own = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2]]
    assert peers_rows.first_differences(own, [[1, 2, 3], [1, 5, 3], [1, 2], [1, 2, 3]]) == [None, 1, 2, 2]


def test_a_row_that_would_take_too_long_is_left_out(tmp_path):
    a = peers._arguments().parse_args(["--longest-row", "50"])
    alone = {"pictures x 1": {"p50, s": 18.0}}
    row = peers._row(a, "http://127.0.0.1:1", MStar(), "pictures", 4, Work(), None, alone, set())
    assert row == {"left out": "4 x 18.0 s > 50 s"}


def test_the_table_has_ratios_and_published_figures():
    rows = {"questions x 1": {"tokens/s": 234.0, "p50, s": 1.0}, "pictures x 1": {"p50, s": 5.0, "per minute": 12.0}}
    peer = {"questions x 1": {"tokens/s": 100.0}, "pictures x 1": {"p50, s": 20.0, "per minute": 3.0}}
    assert peers_tables.ratio("questions x 1", rows["questions x 1"], peer["questions x 1"]) == "2.34"
    assert peers_tables.ratio("pictures x 1", rows["pictures x 1"], peer["pictures x 1"]) == "4.00"
    said = peers_tables.PUBLISHED["vllm-omni 0.30"]
    assert peers_tables.ratio("pictures x 1", rows["pictures x 1"], said["pictures x 1"]) == "4.14"
    assert peers_tables.ratio("edits x 1", {}, said["edits x 1"]) == ""
    work = {"large": 1024, "small": 512, "timesteps": 50, "tokens": 128}
    results = {"device": "a card", "work": work, "servers": {"ours": {"rows": rows}, "mstar": {"rows": peer}}}
    table, starts = peers_tables.tables(results, True)
    columns = {column.header: list(column.cells) for column in table.columns}
    found = dict(zip(zip(columns["requests x clients"], columns["server"], strict=True), columns["ours"], strict=True))
    published = "vllm-omni 0.30, published, H100"
    assert found["questions x 1", "mstar"] == "2.34"
    assert found["questions x 1", published] == "2.00"
    assert found["edits x 1", published] == found["questions x 1", "ours"] == ""
    assert list(starts.columns[0].cells) == ["ours", "mstar"]


@pytest.mark.parametrize("words", [["--rows", "texts,all"], ["--server", "aoti=bagel-opt serve"]])
def test_bad_arguments(words, capsys):
    with pytest.raises(SystemExit):
        peers.main(words)
    assert words[1].split(",")[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"), [("{bad", "other.json"), ("[]", "none of its figures"), ('{"servers": 3}', "none of its figures")]
)
def test_a_file_that_holds_other_things_is_refused(tmp_path, text, said):
    place = tmp_path / "other.json"
    place.write_text(text)
    with pytest.raises(SystemExit, match=said) as refused:
        peers.main(["--sizes", "tiny", "--folder", str(tmp_path), "--json", str(place), "--no-ours"])
    assert "give another file as --json" in str(refused.value)
    assert place.read_text() == text


@pytest.mark.parametrize("clients", ["x", "0", "1,", "-1"])
def test_clients_are_numbers(clients, capsys):
    with pytest.raises(SystemExit):
        peers.main([f"--clients={clients}"])
    assert f"{clients!r}; give numbers, as 1,16" in capsys.readouterr().err
