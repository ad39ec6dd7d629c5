"""/v1/videos with a Lance checkpoint, by the openai client unchanged."""

import asyncio
import io
import sys
import time
import urllib.request
from types import SimpleNamespace

import numpy as np
import openai
import pytest
from lance_cases import CHECKPOINT, loaded
from PIL import Image
from serving import data_url, png, serving, until
from support import CHECKPOINT as BAGEL

import bagel_opt
from bagel_opt import Profile, save_video
from bagel_opt.serve import pictures
from bagel_opt.serve import videos as kept
from bagel_opt.serve.arrival import CancelledError, QueueFullError
from bagel_opt.serve.engine_thread import Decoded, Step
from bagel_opt.serve.limits import VIDEO_PIXELS
from bagel_opt.serve.videos import VideoJob, Videos
from bagel_opt.videos import read_video

pytest.importorskip("av")
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
FEW = {"num_timesteps": 3, "seed": 1}
SMALL = {"resolution_vae": 64, "resolution_vit": 84}
ASKED = {"prompt": "a ball", "size": "48x32", "extra_body": {"num_frames": 9, **FEW}}


@pytest.fixture(scope="module")
def model():
    return bagel_opt.load(
        CHECKPOINT, device="cpu", profile=Profile("lance", rows=4, slots=800, text=64, patches=300, latents=300)
    )


@pytest.fixture
def held(server):
    """The server's programs wait until they are let go."""
    server.runtime.open.clear()
    yield server.runtime.open
    server.runtime.open.set()


def done(client, video):
    """The video once it is completed or has failed."""
    return client.videos.poll(video.id, poll_interval_ms=20)


def frames_of(client, video):
    data = client.videos.download_content(video.id).read()
    found = read_video(data, None)
    assert found.fps == video.fps
    return list(found.pick(range(found.count)))


def alike(frames, others):
    """H.264 keeps a fourth of the colours."""
    pairs = zip(frames, others, strict=True)
    return all(np.abs(np.asarray(a.convert("L"), float) - np.asarray(b.convert("L"))).mean() < 8 for a, b in pairs)


def ball(frames=5, size=(64, 48)):
    save_video([Image.new("RGB", size, (30 * i, 90, 50)) for i in range(frames)], file := io.BytesIO())
    return file.getvalue()


def test_a_video_from_a_text(client):
    asked = client.videos.create(**ASKED, seconds=openai.omit)
    assert (asked.object, asked.progress, asked.error, asked.completed_at, asked.expires_at) == ("video", 0, None, None, None)  # fmt: skip
    assert asked.status in ("queued", "in_progress")
    assert abs(asked.created_at - time.time()) < 60
    video = done(client, asked)
    assert (video.status, video.progress, video.id, video.model, video.prompt) == ("completed", 100, asked.id, "test", "a ball")  # fmt: skip
    assert (video.size, video.seconds, video.num_frames, video.fps, video.seed) == ("48x32", "0.667", 9, 12, 1)
    assert video.completed_at >= video.created_at
    assert video.expires_at == video.completed_at + 3600
    want = loaded().generate("a ball", output="video", height=32, width=48, num_frames=9, **FEW)
    found = frames_of(client, video)
    assert alike(found, want)
    assert not alike(found, want[::-1])


def test_create_and_poll_with_seconds(client):
    video = client.videos.create_and_poll(
        prompt="a ball", model="test", seconds="1", size="32x32", extra_body=FEW, poll_interval_ms=20
    )
    assert (video.num_frames, video.seconds) == (13, "1")
    video = client.videos.create_and_poll(
        prompt="a ball", seconds="1", size="32x32", extra_body={"fps": 4, "seed": 3, "num_timesteps": 2}, poll_interval_ms=20
    )  # fmt: skip
    assert (video.num_frames, video.seconds, video.fps, len(frames_of(client, video))) == (5, "1", 4, 5)


def sent(client, data, name, **asked):
    """As a file, as an object in a form, as JSON: the videos."""
    options, reference = asked.pop("extra_body"), {"image_url": data_url(data)}  # whatever that calls its kind
    as_json = {**asked, **options, "input_reference": reference}
    return [
        client.videos.create(input_reference=(name, data), extra_body=options, **asked),
        client.videos.create(extra_body={**options, "input_reference": reference}, **asked),
        client.videos.retrieve(client.post("/videos", body=as_json, cast_to=object)["id"]),
    ]


def test_a_video_that_begins_with_a_picture(client):
    options = {"num_frames": 5, **FEW, **SMALL}
    want = loaded().generate("it rolls", image=png(48), output="video", **options)
    for video in sent(client, png(48), "a.png", prompt="it rolls", extra_body=options):
        video = done(client, video)
        assert video.size == "64x64"
        assert alike(frames_of(client, video), want)


def test_a_video_that_is_edited(client):
    want = loaded().edit(video=ball(), instruction="red", **FEW, **SMALL)
    for video in sent(client, ball(), "a.mp4", prompt="red", extra_body={**FEW, **SMALL}):
        video = done(client, video)
        assert video.num_frames == len(want) == 5
        assert alike(frames_of(client, video), want)


def test_progress(server, client, held):
    video = client.videos.create(**ASKED)
    assert video.status in ("queued", "in_progress")  # as soon as the engine takes it up
    assert video.progress == 0
    held.set()
    seen = set()
    while video.status in ("queued", "in_progress"):
        video = client.videos.retrieve(video.id)
        seen.add((video.status, video.progress))
    assert ("completed", 100) in seen
    [job] = [job for job in server.service.videos.held.values() if job.id == video.id]
    assert (job.ticket, job.following) == (None, None)  # neither frames nor caches are kept


def test_progress_counts_steps_and_parts(monkeypatch):
    """2 steps and 3 parts: a fifth of 99 each, and 100 once the file is written."""
    seen = []

    class Ticket:
        plan = SimpleNamespace(steps=[0, 0], canvas=SimpleNamespace(grid=(3, 2, 2)), images=[])
        outputs = ([Image.new("RGB", (16, 16))],)
        begun = True

        async def __aiter__(self):
            for event in (Step(0, 2), Step(1, 2), Decoded(0, 3), Decoded(1, 3), Decoded(2, 3)):
                yield event
                seen.append(job.progress)

    async def run():
        nonlocal job
        job = videos.begin(None, {}, 12, Ticket())
        await job.following

    job, videos = None, Videos()
    asyncio.run(run())
    assert seen == [19, 39, 59, 79, 99]
    assert (job.status, job.progress) == ("completed", 100)
    monkeypatch.setattr(kept, "BYTES", 10)  # one that is larger than all may be does not stay, though nobody asks
    asyncio.run(run())
    assert job.data
    assert videos.held == {}


def test_a_list_in_pages(model):
    with serving(model) as server:
        client = server.client()
        assert list(client.videos.list()) == []
        ids = [client.videos.create(**ASKED).id for _ in range(5)]
        assert [video.id for video in client.videos.list()] == ids[::-1]
        assert [video.id for video in client.videos.list(order="asc", limit=2)] == ids  # the client asks on
        page = client.videos.list(order="asc", limit=2, after=ids[1])
        assert ([video.id for video in page.data], page.has_more, page.last_id) == (ids[2:4], True, ids[3])
        for wrong, message in (({"limit": 0}, "limit: "), ({"order": "up"}, "order: allowed"), ({"after": "x"}, "after: "), ({"extra_query": {"a": 1}}, "a: no such field")):  # fmt: skip
            with pytest.raises(openai.BadRequestError, match=message):
                client.videos.list(**wrong)


def test_deleting_a_video(server, client):
    video = done(client, client.videos.create(**ASKED))
    gone = client.videos.delete(video.id)
    assert (gone.id, gone.deleted, gone.object) == (video.id, True, "video.deleted")
    for call in (client.videos.retrieve, client.videos.download_content, client.videos.delete):
        with pytest.raises(openai.NotFoundError, match=f"there is no video '{video.id}'; it was deleted"):
            call(video.id)


def test_deleting_cancels(server, client, held):
    videos = [client.videos.create(**ASKED) for _ in range(3)]
    tickets = [server.service.videos.held[video.id].ticket for video in videos]
    for video in videos:
        client.videos.delete(video.id)
    held.set()
    until(lambda: not server.engine.tickets)
    assert all(isinstance(ticket.outputs, CancelledError) for ticket in tickets)
    assert server.rows_in_use() == 0
    assert server.service.videos._size() == sum(len(job.data) for job in server.service.videos.held.values())


def test_content_that_is_not_there_yet(client, held):
    video = client.videos.create(**ASKED)
    with pytest.raises(openai.NotFoundError, match=r"the video is (queued|in_progress), 0% done; ask again") as refused:
        client.videos.download_content(video.id)
    assert refused.value.code == "video_not_ready"
    held.set()
    video = done(client, video)
    with pytest.raises(openai.BadRequestError, match="variant: allowed: 'video'"):
        client.videos.download_content(video.id, variant="thumbnail")


def test_a_failure_is_told(server, client):
    server.runtime.failing["vae_decode_next"] = RuntimeError("secret")
    try:
        video = done(client, client.videos.create(**ASKED))
    finally:
        server.runtime.failing.clear()
    assert (video.status, video.error.code) == ("failed", "internal_error")
    assert video.error.message == "the server failed on this request"
    assert (video.completed_at, video.expires_at > time.time()) == (None, True)
    with pytest.raises(openai.NotFoundError, match="no content, since the video failed: the server failed"):
        client.videos.download_content(video.id)


def test_the_time_limit(model):
    with serving(model, timeout=0.5) as server:
        client = server.client()
        server.runtime.open.clear()
        video = client.videos.create(**ASKED)
        time.sleep(0.6)
        server.runtime.open.set()
        video = done(client, video)
        assert (video.status, video.error.code) == ("failed", "deadline_exceeded")


def test_the_line_is_bounded(model):
    with serving(model, max_queue=2) as server:
        client = server.client()
        server.runtime.open.clear()
        videos = [client.videos.create(**ASKED) for _ in range(2)]
        with pytest.raises(openai.RateLimitError):
            client.videos.create(**ASKED)
        assert client.videos.retrieve(videos[1].id).status == "queued"  # asking is never refused
        client.videos.delete(videos[0].id)
        server.runtime.open.set()
        until(lambda: len(server.engine.tickets) < 2)
        assert done(client, videos[1]).status == "completed"


def test_what_is_under_way_ends_with_the_server(model):
    with serving(model) as server:
        server.runtime.open.wait = lambda seconds: time.sleep(0.05) or True  # 200 steps take 10 seconds then
        asked = {**ASKED, "extra_body": {"num_frames": 9, "num_timesteps": 200}}
        ticket = server.service.videos.held[server.client().videos.create(**asked).id].ticket
    assert isinstance(ticket.outputs, CancelledError)
    assert not server.engine.thread.is_alive()


def test_each_key_has_its_own(model):
    with serving(model, keys=["one", "two"]) as server:
        one, two = server.client("one"), server.client("two")
        video = done(one, one.videos.create(**ASKED))
        assert [v.id for v in one.videos.list()] == [video.id]
        assert list(two.videos.list()) == []
        for call in (two.videos.retrieve, two.videos.download_content, two.videos.delete):
            with pytest.raises(openai.NotFoundError):
                call(video.id)
        with pytest.raises(openai.BadRequestError):
            two.videos.list(after=video.id)
        with pytest.raises(openai.AuthenticationError):
            server.client("three").videos.retrieve(video.id)
        assert frames_of(one, video)


def test_no_room_for_more(model, monkeypatch):
    with serving(model) as server:
        client = server.client()
        monkeypatch.setattr(kept, "COUNT", 1)
        server.runtime.open.clear()
        video = client.videos.create(**ASKED)
        with pytest.raises(openai.RateLimitError) as refused:
            client.videos.create(**ASKED)
        assert refused.value.response.headers["retry-after"] == "10"
        server.runtime.open.set()
        done(client, video)
        assert done(client, client.videos.create(**ASKED)).id in server.service.videos.held
        assert video.id not in server.service.videos.held


def finished(videos, size, ended):
    job = VideoJob(None, {}, 12, 0, data=b"a" * size, ended=ended)
    videos.held[job.id] = job
    return job


def test_old_ones_give_way(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(kept.time, "time", lambda: now[0])
    monkeypatch.setattr(kept, "BYTES", 100)
    monkeypatch.setattr(kept, "COUNT", 3)
    videos, plan = Videos(), SimpleNamespace(images=[])
    first, second = finished(videos, 40, 1000), finished(videos, 60, 1001)
    videos.check_room(plan)
    assert [*videos.held.values()] == [first, second]
    third = finished(videos, 1, 1002)
    videos.check_room(plan)  # by bytes and by number the oldest gives way
    assert [*videos.held.values()] == [second, third]
    now[0] = 1001 + 3600.5
    assert videos.of(None) == [third]
    for _ in range(3):
        job = VideoJob(None, {}, 12, 0)
        videos.held[job.id] = job
    with pytest.raises(QueueFullError):  # what is under way does not
        videos.check_room(plan)
    assert third not in videos.of(None)
    assert len(videos.of(None)) == 3
    frame = Image.new("RGB", (4, 3))
    reads = SimpleNamespace(images=[SimpleNamespace(vae=[frame] * 2, vit=[frame])])
    assert kept.reading(reads) == 108
    videos.held.clear()
    with pytest.raises(QueueFullError):
        videos.check_room(reads)


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"seconds": 60}, "seconds", "seconds: 721 frames; allowed: at most 121"),
        ({"seconds": 2, "num_frames": 25}, "seconds", "seconds: give seconds, or num_frames, not both"),
        ({"size": "2000x32"}, "size", "size: .*2000.*allowed"),
        ({"size": "48x32", "height": 32, "width": 48}, "size", "not both"),
        ({"num_timesteps": 201}, "num_timesteps", "more than the 200 that this server allows"),
        ({"think": True}, "think", "Lance has no such option"),
        ({"n": 2}, "n", "no such field"),
        ({"input_reference": {"file_id": "x"}}, "input_reference.file_id", "no files are kept"),
        ({"input_reference": {"image_url": "https://example.org/a.mp4"}}, "input_reference.image_url", "not fetched here"),
        ({"input_reference": {"image_url": "data:video/mp4;base64,AAAA"}}, "input_reference.image_url", "no PNG, JPEG, WEBP picture, and as a video: this file is no video"),
        ({"input_reference": {"image_url": "PICTURE"}, "size": "64x64"}, "size", "leave it out"),
        ({"input_reference": {"image_url": "VIDEO"}, "seconds": 2}, "seconds", "leave it out"),
        ({"input_reference": {"image_url": "VIDEO"}, "size": "input"}, "size", "frames are .*64x49.* takes even sides"),
        ({"size": "1024x1024", "seconds": 10}, None, "the request needs latents of at least"),
        ({"prompt": ""}, "prompt", "prompt"),
    ],
)  # fmt: skip
def test_what_is_refused(client, asked, param, message):
    url = asked.get("input_reference", {}).get("image_url")
    if url == "PICTURE":
        asked = {**asked, "input_reference": {"image_url": data_url(png(48))}}
    elif url == "VIDEO":
        asked = {**asked, "input_reference": {"image_url": data_url(gif((64, 49)))}, **SMALL}
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.post("/videos", body={"prompt": "a", **FEW, **asked}, cast_to=object)
    assert refused.value.param == param
    assert "\n" not in refused.value.message


def gif(size, frames=5):
    first, *rest = (Image.new("RGB", size, (40 * i, 90, 50)) for i in range(frames))
    first.save(file := io.BytesIO(), "GIF", save_all=True, append_images=rest, duration=80)
    return file.getvalue()


def test_a_video_of_too_many_pixels(client, monkeypatch):
    assert VIDEO_PIXELS == 2**30
    monkeypatch.setattr(pictures, "VIDEO_PIXELS", 5 * 64 * 48 - 1)
    with pytest.raises(openai.BadRequestError, match="more than 15359 pixels, all its frames together"):
        client.videos.create(prompt="a", input_reference=("a.mp4", ball(), "video/mp4"))


def test_a_video_that_is_too_short(client):
    save_video([Image.new("RGB", (64, 48))] * 2, file := io.BytesIO(), 60)
    with pytest.raises(
        openai.BadRequestError, match="input_reference: 2 frames at 60 a second are too short"
    ) as refused:
        client.videos.create(prompt="a", input_reference=("a.mp4", file.getvalue(), "video/mp4"))
    assert refused.value.param == "input_reference"


def test_forms_that_say_too_much(client):
    files = [("input_reference", ("a.png", png(), "image/png"))] * 2
    with pytest.raises(openai.BadRequestError, match="input_reference: 2 files; a video has one at most"):
        client.post("/videos", body={"prompt": "a"}, files=files, cast_to=object, options={"headers": {"Content-Type": "multipart/form-data"}})  # fmt: skip


def test_another_model(client):
    with pytest.raises(openai.NotFoundError, match="the model 'sora-2' does not exist"):
        client.videos.create(prompt="a", model="sora-2")


def test_a_model_without_videos(load):
    with serving(load(BAGEL, "onnx")) as server:
        client = server.client()
        with pytest.raises(openai.BadRequestError, match="the model 'test' draws no videos; serve a Lance") as refused:
            client.videos.create(**ASKED)
        assert (refused.value.param, refused.value.code) == ("model", "videos_not_served")
        assert list(client.videos.list()) == []


def test_without_pyav(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(openai.BadRequestError, match=r"cannot write videos: .*pip install 'bagel-opt\[video\]'"):
        client.videos.create(**ASKED)


def test_replicas_keep_no_videos(model):
    with serving(model) as server:
        object.__setattr__(server.service, "videos", None)
        client = server.client()
        for call in (lambda: client.videos.create(**ASKED), client.videos.list, lambda: client.videos.retrieve("a")):
            with pytest.raises(openai.BadRequestError, match=r"replicas keep no videos, .* without --replicas"):
                call()


def test_counted(server, client):
    def count():
        text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
        return [float(line.split()[-1]) for line in text.splitlines() if line.startswith(("bagel_videos_total ", "bagel_pictures_total "))]  # fmt: skip

    pictures, videos = count()
    done(client, client.videos.create(**ASKED))
    assert count() == [pictures, videos + 1]


def test_the_model_card_says_what_it_draws(client):
    [card] = client.models.list().data
    assert (card.draws, card.thinks) == (["image", "video"], False)
