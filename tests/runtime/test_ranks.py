"""A model on several ranks, here processes of the CPU that exchange tensors by Gloo, answers as one process does."""

import contextlib
import copy
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
from bundles import PROFILES, cached_export
from PIL import Image
from support import CHECKPOINT, ODD, ROOT, cases, check_together, relative

import bagel_opt
from bagel_opt import BundleError, Request
from bagel_opt.runtime import groups, members
from bagel_opt.runtime.calls import Call
from bagel_opt.runtime.parallel import BY_WEIGHTS, RankRuntime, Shares, shares_for
from bagel_opt.runtime.torch import TorchRuntime

pytestmark = pytest.mark.usefixtures("quick_ranks")  # those of scripts here are new processes
BOTH = {"guidance": 2, "sequence": 2}
named = {case.name: case for case in cases()}
ODD_SIZE = {"height": 80, "width": 48, "num_timesteps": 6, "seed": 3, "cfg_interval": (0.5, 1.0)}  # 15 latents


def start(gpus, parallel="auto", source=CHECKPOINT, **settings):
    return bagel_opt.load(source, device="cpu", gpus=gpus, parallel=parallel, **settings)


@pytest.fixture(
    scope="module",
    params=[
        (2, "auto"),
        (3, "sequence"),
        pytest.param((2, "guidance"), marks=pytest.mark.second),
        pytest.param((2, "tensor"), marks=pytest.mark.second),
        pytest.param((3, "auto"), marks=pytest.mark.second),
        pytest.param((3, "guidance"), marks=pytest.mark.second),
        pytest.param((4, BOTH), marks=pytest.mark.second),
        pytest.param((4, "auto"), marks=pytest.mark.second),
    ],
    ids=str,
)
def several(request):
    model = start(*request.param)
    yield model
    model.close()


@pytest.fixture(scope="module")
def two():
    model = start(2)
    yield model
    model.close()


def repeat(call):
    """Until it raises, or for a while."""
    end = time.monotonic() + 15
    while time.monotonic() < end:
        call()


def watched(model, inputs, options):
    events = []
    return events, model.run(inputs, on_step=events.append, **options)


def check_alike(one, other, inputs=("a red circle",), **options):
    """Texts equal, every step's latents and velocities to 1e-5, pictures but for single steps of rounding. After a round whose
    picture has such steps, which the next one reads, to 1e-3. -> what the first gave"""
    (events, outputs), (want, expected) = (watched(model, inputs, options) for model in (one, other))
    assert len(events) == len(want)
    drawn = [np.array_equal(*pair) for pair in zip(outputs, expected, strict=True) if not isinstance(pair[0], str)]
    for got, step in zip(events, want, strict=True):
        assert (got.index, got.t, got.round) == (step.index, step.t, step.round)
        limit = 1e-5 if all(drawn[: step.round]) else 1e-3
        assert relative(got.x_t, step.x_t) < limit
        assert relative(got.v_t, step.v_t) < limit
    for got, output in zip(outputs, expected, strict=True):
        if isinstance(output, str):
            assert got == output
        else:
            assert np.abs(np.asarray(got).astype(int) - np.asarray(output)).max() <= 1
    return events, outputs


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_the_official_answers(several, eager, case):
    events, outputs = check_alike(several, eager, case.inputs, **case.options)
    assert case.velocity_error(events) < 1e-4
    case.check_outputs(outputs)


def test_requests_together(several, eager):
    check_together(eager, several)


@pytest.mark.parametrize("step_cache", ["teacache", "taylorseer"])
def test_step_caches_and_latents_that_do_not_divide(several, eager, step_cache):
    """Also where only some of the rows are evaluated."""
    options = {**ODD_SIZE, "step_cache": step_cache, "num_timesteps": 16}
    check_alike(several, eager, **options)
    edit = Request([Image.new("RGB", (64, 64), "red"), "make it blue"], num_timesteps=9, seed=1)
    others = [Request(["a red circle"], **ODD_SIZE), edit, Request(["a red circle"], **options)]
    for got, want in zip(several.run_many(others), eager.run_many(others), strict=True):
        assert np.abs(np.asarray(got[0]).astype(int) - np.asarray(want[0])).max() <= 1


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 3, "top_p": 0.9}])
def test_decoding_by_weights(two, eager, sampling):
    """Each rank reads its part of them; of one row and of several."""
    before, seen = two.runtime.rank.runtime.groups.count, []
    requests = [Request([text], output="text", max_think_tokens=20, **sampling) for text in ("why?", "a b", "who")]
    for request in requests:
        seen.append(two.run(request.inputs, output="text", max_think_tokens=20, **sampling))
        assert seen[-1] == eager.run(request.inputs, output="text", max_think_tokens=20, **sampling)
    assert two.run_many(requests) == seen
    layers = two.config.llm.num_hidden_layers
    assert two.runtime.rank.runtime.groups.count - before > 20 * (2 * layers + 1)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 3, "top_p": 0.9}])
def test_going_on_with_a_token_before_the_host_has_it(two, eager, sampling, monkeypatch):
    """As GPUs do."""
    before, tell, told = TorchRuntime.chosen, RankRuntime.first_ranks, []
    monkeypatch.setattr(TorchRuntime, "chosen", lambda self, ids: (before(self, ids)[0], ids.clamp(min=0)))
    monkeypatch.setattr(RankRuntime, "first_ranks", lambda self, ids: told.append(ids) or tell(self, ids))
    requests = [Request([t], output="text", max_think_tokens=20, **sampling) for t in ("why?", "a b", "who", "a b c")]
    got = two.run_many(requests)
    monkeypatch.undo()
    assert got == eager.run_many(requests)
    assert len(told) > 10


def test_all_ranks_go_on_with_what_the_first_chose(two, eager, monkeypatch):
    """Also where another rank's own numbers would have another one first."""
    monkeypatch.setattr(TorchRuntime, "chosen", lambda self, ids: (lambda: ids.numpy(), ids))
    found, numbers = [], np.zeros(1, np.float32)
    for runtime in (two.runtime, eager.runtime):
        logits = np.eye(1, eager.config.llm.vocab_size, 7, dtype=np.float32)
        (ids,) = runtime.run("choose", [logits, numbers, numbers])
        if runtime is two.runtime:
            runtime._here(ids).fill_(9)
            (wait, ids) = runtime.chosen(ids)
            assert wait() == [9]
        else:
            ids = np.array([9])
        caches = runtime.caches(1, 64)
        found.append(runtime.host(runtime.run("decode", [ids, np.array([0]), np.array([0])], caches)[0]))
    assert relative(*map(torch.from_numpy, found)) < 1e-5


def test_interleaved(two, eager):
    options = {"output": "interleaved", "num_timesteps": 5, "max_rounds": 2, "max_think_tokens": 12, "seed": 5}
    check_alike(two, eager, [Image.new("RGB", (48, 64), "red"), "what comes next?"], **options)


@pytest.mark.second
def test_a_checkpoint_of_other_sizes():
    one, other = bagel_opt.load(ODD / "checkpoint", device="cpu"), start(3, "sequence", ODD / "checkpoint")
    try:
        for case in cases(ODD):
            check_alike(other, one, case.inputs, **case.options)
    finally:
        other.close()


@pytest.mark.second
@pytest.mark.parametrize("parallel", ["auto", "sequence"])
def test_compiled(load, parallel):
    """What ranks share out. The encoders they run as one process does, and compiling those takes as long again."""
    model, eager = start(2, parallel, backend="compile", profile=PROFILES[CHECKPOINT]), load(CHECKPOINT, "eager")
    some = [named[name] for name in ("text_only", "text_to_image", "taylorseer")]
    try:
        for case in some:
            check_alike(model, eager, case.inputs, **case.options)
        for case, outputs in zip(some, model.run_many([case.request() for case in some]), strict=True):
            case.check_outputs(outputs)
    finally:
        model.close()


@pytest.mark.second
def test_a_bundle(load):
    """Its programs are for one row or for all: each rank takes rows one by one."""
    folder = cached_export(CHECKPOINT, PROFILES[CHECKPOINT], format="export")
    model = start(2, source=folder)
    try:
        check_alike(model, load(CHECKPOINT, "eager"), **ODD_SIZE)
    finally:
        model.close()
    with pytest.raises(BundleError, match="use parallel='guidance'"):
        start(2, "sequence", folder)


def test_adapters(two, eager, tmp_path):
    pytest.importorskip("peft")
    from adapters import BOTH as TARGETS
    from adapters import adapted

    adapted(targets=TARGETS).save_pretrained(tmp_path)
    plain, question = two.generate("a red circle", num_timesteps=4, seed=1), {"output": "text", "max_think_tokens": 30}
    merged = bagel_opt.load(CHECKPOINT, device="cpu", lora=tmp_path)
    two.chat("why?", max_think_tokens=2)
    two.set_adapters({"one": tmp_path})
    assert not two.runtime.inner.programs[BY_WEIGHTS].run.slices  # of weights that adapters may have moved
    try:
        check_alike(two, merged, **ODD_SIZE)
        check_alike(two, merged, ["why?"], **question)
        with pytest.raises(FileNotFoundError):
            two.set_adapters({"none": tmp_path / "none"})
        check_alike(two, merged, **ODD_SIZE)
    finally:
        two.set_adapters({})
    assert two.generate("a red circle", num_timesteps=4, seed=1) == plain
    check_alike(two, eager, ["why?"], **question)


@pytest.mark.parametrize("rank", [0, 1])
def test_adapters_that_one_rank_alone_cannot_take(two, eager, tmp_path, monkeypatch, rank):
    """No rank waits for it, and none has any then; the next ones are taken."""
    pytest.importorskip("peft")
    from adapters import adapted

    adapted().save_pretrained(tmp_path / "one")
    two.set_adapters({"before": tmp_path / "one"})
    real = two.runtime.inner.set_adapters

    def lacks_memory(adapters):
        if adapters:
            raise MemoryError("too little memory")
        real(adapters)

    try:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            if rank == 0:
                patch.setattr(two.runtime.inner, "set_adapters", lacks_memory)
            place = tmp_path / "one" if rank == 0 else "/proc/self/cwd/one"  # of each process another folder
            kind, told = (RuntimeError, "rank 1: .*/proc/self/cwd/one") if rank else (MemoryError, "too little memory")
            with pytest.raises(kind, match=f"{told}.*; other ranks took these .* set them again"):
                two.set_adapters({"one": place})
        assert two.runtime.adapters == {}
        check_alike(two, eager, **ODD_SIZE)
        monkeypatch.chdir(tmp_path)
        two.set_adapters({"one": "one"})
        check_alike(two, bagel_opt.load(CHECKPOINT, device="cpu", lora=tmp_path / "one"), **ODD_SIZE)
    finally:
        two.set_adapters({})


def test_a_table_in_8_bits_beside_weights_that_are_taken_apart():
    kinds = {"embeddings": "int8"}
    model, alone = start(2, "tensor", quantization=kinds), bagel_opt.load(CHECKPOINT, device="cpu", quantization=kinds)
    try:
        check_alike(model, alone, **ODD_SIZE)
        check_alike(model, alone, ["why?"], output="text", max_think_tokens=30)
    finally:
        model.close()


def test_models_and_threads_at_once(several, two):
    jobs = [(model, seed) for seed in (1, 2) for model in (several, two)]

    def draw(model, seed):
        return model.generate("a red circle", num_timesteps=4, seed=seed)

    want = [draw(*job) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(draw, *zip(*jobs, strict=True))) == want


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_callback_that_raises_ends_its_request_alone(two, kind):
    def stop(step):
        raise kind("enough")

    options = {"num_timesteps": 4, "seed": 1}
    want = two.generate("a red circle", **options)
    with pytest.raises(kind, match="enough"):
        two.run_many([Request(["a blue circle"], on_step=stop, **options), Request(["a red circle"], **options)])
    assert two.generate("a red circle", **options) == want


def test_ctrl_c_ends_its_request_alone(two, monkeypatch):
    """Also in the midst of a call, for which the other rank may wait."""
    real, options = two.runtime.rank.perform, {"num_timesteps": 4, "seed": 1}
    want = two.generate("a red circle", **options)

    def perform(call):
        if call.method == "run":
            signal.raise_signal(signal.SIGINT)
        return real(call)

    monkeypatch.setattr(two.runtime.rank, "perform", perform)
    with pytest.raises(KeyboardInterrupt):
        two.generate("a red circle", **options)
    monkeypatch.undo()
    assert two.generate("a red circle", **options) == want


def test_a_fork_leaves_the_ranks_alone(two):
    """It can neither use nor end them."""
    with warnings.catch_warnings(action="ignore"):  # of threads, which a fork has not
        child = os.fork()
    if not child:
        status = 1
        signal.alarm(20)  # ends it where it waits for an answer
        try:
            two.set_adapters({})
        except RuntimeError as error:
            status = int("of which this one is a fork" not in str(error))
        finally:
            two.close()
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    two.generate("a red circle", num_timesteps=3)


def test_no_copies(two):
    for make in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="load it in each process"):
            make(two)


def test_a_model_that_nobody_holds_ends_its_processes():
    model = start(2)
    model.generate("a red circle", num_timesteps=3)
    (process,) = model.runtime.members.processes
    del model
    gc.collect()
    assert process.wait(5) == 0


def test_gathering_is_timed(two):
    assert 0 < two.runtime.gather_seconds(1000) < 1


def test_tensors_that_nobody_uses_are_released(two):
    sizes = []
    for _ in range(3):
        two.generate("a red circle", num_timesteps=5, seed=1, step_cache="taylorseer")
        sizes.append(len(two.runtime.rank.values))
    assert sizes[1] == sizes[2] < 20


def test_what_is_in_parts_is_gathered_for_the_host(two, eager):
    found = []
    for runtime in (two.runtime, eager.runtime):
        inputs, caches = [runtime.zeros((1, 9, two.config.latent_dim)), *evaluation(9)], runtime.caches(1, 64)
        found.append(runtime.host(runtime.run("generate", inputs, caches)[1]))
        runtime.give_back(caches)
    assert found[0].shape[:2] == (1, 9)
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)


def evaluation(latents):
    """The inputs of a flow evaluation of one row, but for the latents."""
    return [np.zeros(1, np.float32), np.zeros((1, latents), np.int64), *[np.zeros(1, np.int64)] * 3]


def test_what_fails_alike_loses_nothing(two):
    with pytest.raises(ValueError, match="cfg_text_scale"):
        two.generate("a red circle", cfg_text_scale="much")
    with pytest.raises(KeyError, match="nonsense"):
        two.runtime.run("nonsense", [np.zeros(1)])
    x, v = (two.runtime.zeros((1, 8, 3)) for _ in range(2))  # of other channels
    caches = two.runtime.caches(1, 64)
    with pytest.raises(RuntimeError):
        two.runtime.run("generate", [x, *evaluation(8)], caches)
    two.runtime.give_back(caches)
    assert not two.runtime.host(v).any()
    two.generate("a red circle", num_timesteps=3)


def test_what_fails_on_one_rank_alone_ends_the_request(two):
    """Where no other rank waits for it, the model goes on."""
    x = two.runtime.zeros((1, 4))
    two.runtime.members.send(Call(next(two.runtime.numbers), "zeros", ((1,), False), (x.kept.name,)))
    two.runtime.write_row(x, 0, np.ones(4, np.float32))
    with pytest.raises(RuntimeError, match="rank 1: "):
        repeat(lambda: two.runtime.host(x))
    two.generate("a red circle", num_timesteps=3)


def lost_on_one_rank(model):
    """The inputs of a flow evaluation, of which rank 1 lacks one."""
    x = model.runtime.zeros((1, 8, model.config.latent_dim))
    model.runtime.members.send(Call(next(model.runtime.numbers), "zeros", ((1,), False), (x.kept.name,)))
    return [x, *evaluation(8)]


def test_what_fails_on_one_rank_while_others_wait_ends_the_model():
    model = start(2, "sequence")
    inputs, caches = lost_on_one_rank(model), model.runtime.caches(1, 64)
    with pytest.raises(ChildProcessError, match="load the model again"):
        model.runtime.run("generate", inputs, caches)
    with pytest.raises(ChildProcessError, match="load the model again"):
        model.generate("a red circle")
    check_ended(model)


def test_what_fails_in_a_rehearsal_loses_nothing(two, eager, monkeypatch):
    """On GPUs every evaluation larger than those before has one: a rank may lack memory."""
    monkeypatch.setattr(two.runtime, "rehearses", True)
    inputs, caches = lost_on_one_rank(two), two.runtime.caches(1, 64)
    with pytest.raises(RuntimeError, match="rank 1: "):
        two.runtime.run("generate", inputs, caches)
    two.runtime.give_back(caches)
    for case in cases():
        check_alike(two, eager, case.inputs, **case.options)
    assert two.runtime.rehearsed.keys() >= {"generate", "decode"}


def check_ended(model):
    for process in model.runtime.members.processes:
        assert process.wait(5) is not None
    model.close()
    model.close()
    assert not os.path.exists(model.runtime.members.folder.name)
    with pytest.raises((ChildProcessError, RuntimeError), match="load"):
        model.generate("a red circle")


def test_a_gather_that_gloo_does_not_end_is_left():
    store, found, device = dist.HashStore(), {}, torch.device("cpu")

    def join(rank):
        found[rank] = groups.Group(store, [0, 1], rank, device)

    def gather():
        try:
            found[0].gather(torch.ones(3))  # for which the other never comes
        except RuntimeError as error:
            found["error"] = str(error)

    joining = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in joining:
        thread.start()
    for thread in joining:
        thread.join()
    waiting = threading.Thread(target=gather)
    waiting.start()
    time.sleep(1.2)  # longer than it waits before it looks
    assert waiting.is_alive()
    found[0].abort()
    waiting.join(10)
    assert found["error"] == "a rank is gone"


@pytest.mark.parametrize("failed", [None, "the connection is closed"])
def test_a_gather_that_ends_just_as_its_waiter_looks(failed):
    """It is what it is: no failure that it took a second."""

    class Work:
        looked = False

        def wait(self, timeout=None):
            if timeout and not self.looked:
                self.looked = True
                raise RuntimeError("Operation timed out!")
            if failed:
                raise RuntimeError(failed)

        def is_completed(self):
            return self.looked

    group = types.SimpleNamespace(device=torch.device("cpu"), aborted=False)
    with pytest.raises(RuntimeError, match=failed) if failed else contextlib.nullcontext():
        groups.Group._await(group, Work())


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.second) for n in range(1, 20))])
def test_a_rank_that_dies_ends_requests(number):
    draw = random.Random(number)
    model = start(draw.choice([2, 3]), draw.choice(["guidance", "sequence"]))
    victim = draw.choice(model.runtime.members.processes)
    timer = threading.Timer(draw.uniform(0, 0.5), victim.kill)
    timer.start()
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match=f"process {victim.pid}.*signal 9.*load the model again"):
        repeat(lambda: model.generate("a red circle", height=64, width=64, num_timesteps=12, seed=1))
    assert time.monotonic() - began < 15
    check_ended(model)


@pytest.mark.second
def test_a_rank_that_dies_before_it_joins(monkeypatch):
    """While the first waits to be joined."""
    real = members.Members.beside

    def beside(self, call):
        self.processes[0].kill()
        return real(self, call)

    monkeypatch.setattr(members.Members, "beside", beside)
    monkeypatch.setattr(members.Members, "send", lambda *_: None)  # so that the others do not join before
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match="signal 9"):
        start(2)
    assert time.monotonic() - began < 30


@pytest.mark.second
def test_a_rank_that_hangs_ends_requests(monkeypatch):
    monkeypatch.setattr(groups, "PATIENCE", 3)
    model = start(2, "sequence")
    os.kill(model.runtime.members.processes[0].pid, signal.SIGSTOP)
    with pytest.raises(ChildProcessError, match="load the model again"):
        model.generate("a red circle", num_timesteps=5)
    check_ended(model)


SCRIPT = """
import bagel_opt
model = bagel_opt.load(gpus=2, device="cpu")
print(model.runtime.members.processes[0].pid, flush=True)
while True:
    model.generate("a red circle", num_timesteps=20, seed=1)
"""


def run(script, *before, **settings):
    """A script without `if __name__ == "__main__"`."""
    return subprocess.Popen(
        [*before, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("ends", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.second)])
def test_no_process_is_left(ends, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    first = run(tmp_path / "script.py", sys.executable, start_new_session=True)
    try:
        pid = int(first.stdout.readline())
        time.sleep(0.3)
        os.killpg(first.pid, ends)  # as a terminal does
        first.communicate(timeout=120)
    finally:
        first.kill()
    with pytest.raises(ProcessLookupError):
        repeat(lambda: os.kill(pid, 0))


@pytest.mark.second
def test_closed_standard_streams(tmp_path):
    """As daemons have them."""
    out = tmp_path / "out"
    script = (
        "import bagel_opt, pathlib; model = bagel_opt.load(gpus=2, device='cpu'); "
        f"pathlib.Path({str(out)!r}).write_text(str(model.generate('a red circle', num_timesteps=3).size))"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, script]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=60)
    assert out.read_text() == "(128, 128)"


@pytest.mark.second
def test_torchrun(tmp_path):
    """The first rank returns from load; the other ends with it."""
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            """
            import os
            import bagel_opt
            model = bagel_opt.load(gpus=2, device="cpu", parallel="sequence")
            print("rank", os.environ["RANK"], model.generate("a red circle", num_timesteps=4, seed=1).size)
            model.close()
            """
        )
    )
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    process = run(tmp_path / "script.py", *command)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert out == "rank 0 (128, 128)\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 0}, "gpus=0; allowed are whole numbers"),
        ({"gpus": 2.0}, r"gpus=2.0; allowed"),
        ({"gpus": 2, "parallel": "ring"}, "parallel='ring'; allowed are 'auto', 'guidance', 'sequence', 'tensor', or"),
        ({"gpus": 4, "parallel": {"guidance": 2, "sequence": 2, "tensor": 2}}, "tensor is for all gpus=4 or none"),
        ({"gpus": 2, "parallel": {"tensor": 1}}, "tensor is for all"),
        ({"gpus": 3, "parallel": "tensor"}, "2 key-value heads do not divide by 3; use 'guidance'"),
        ({"gpus": 2, "parallel": "tensor", "quantization": "int8"}, "weights in int8 cannot be taken apart"),
        ({"gpus": 3, "parallel": BOTH}, "must multiply to gpus=3"),
        ({"gpus": 2, "parallel": {"sequence": "2"}}, "must multiply to gpus=2"),
        ({"gpus": 2, "parallel": {"rings": 2}}, "allowed are"),
        ({"gpus": 2, "memory": "1MB"}, "memory='1MB': with the weights in this precision .* it takes at least"),
        ({"parallel": "sequence"}, "give gpus, too"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        bagel_opt.load(CHECKPOINT, device="cpu", **settings)


@pytest.mark.parametrize(
    ("device", "graphs", "streams", "pays"),
    [
        ("cpu", None, True, True),
        ("cuda", 1, None, True),
        ("cuda", None, None, False),
        ("cuda", 1, False, True),
        ("cuda", 1, True, False),
    ],
)
def test_auto_shares_weights_out_where_that_pays(device, graphs, streams, pays):
    """On a GPU where decoding is replayed, as what streams is not. streams: None where no memory= was given."""
    llm = types.SimpleNamespace(num_key_value_heads=2, intermediate_size=64)
    model = types.SimpleNamespace(config=types.SimpleNamespace(llm=llm), kinds={})
    plan = None if streams is None else types.SimpleNamespace(streams_in={"decode": streams}.get)
    inner = types.SimpleNamespace(model=model, device=torch.device(device), graphs=graphs, plan=plan)
    assert shares_for(inner, "auto", 2).tensor is pays


def test_too_many_gpus(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cpu' takes as many processes"):
            bagel_opt.load(CHECKPOINT, gpus=2)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="gpus=2 from cuda:1 on, but this machine has 2"):
        bagel_opt.load(CHECKPOINT, gpus=2, device="cuda:1")


def test_onnx_is_refused(bundle):
    with pytest.raises(BundleError, match="an ONNX bundle runs on one GPU"):
        start(2, source=bundle)


def test_one_gpu_is_no_group():
    model = bagel_opt.load(CHECKPOINT, device="cpu", gpus=1)
    assert "x" not in model.runtime.active()["device"]
    model.close()


@pytest.mark.parametrize(
    ("parallel", "ranks", "rows", "want"),
    [
        ("auto", 2, 2, (2, 1)), ("auto", 2, 3, (1, 2)), ("auto", 4, 2, (2, 2)), ("auto", 4, 6, (2, 2)), ("auto", 4, 1, (1, 4)),
        ("guidance", 2, 3, (2, 1)), ("guidance", 2, 1, (1, 1)), ("sequence", 4, 2, (1, 4)), (BOTH, 4, 1, (1, 2)), (BOTH, 4, 3, (2, 2)),
        ("tensor", 2, 2, (1, 1)), ({"guidance": 2, "tensor": 2}, 2, 2, (2, 1)),
    ],
)  # fmt: skip
def test_shares(parallel, ranks, rows, want):
    assert Shares.read(parallel, ranks).of(rows) == want
