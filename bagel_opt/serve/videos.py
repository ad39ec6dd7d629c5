"""Videos that are made while their clients come and ask: in memory, each of the key that asked for it."""

import asyncio
import io
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from PIL import Image

from bagel_opt.errors import shown
from bagel_opt.sampling.plan import AnyPlan
from bagel_opt.serve.arrival import QueueFullError
from bagel_opt.serve.engine_thread import Decoded, EngineThread, Step, Ticket
from bagel_opt.serve.errors import ApiError, as_api_error
from bagel_opt.videos import save_video

SECONDS = 3600  # for which one is kept once it is done
COUNT = 256  # that are kept; the oldest of those that are done give way
BYTES = 2**30  # of all: their files, and the frames that those under way read
AGAIN = 10  # seconds after which to come again where there is no room
WRITER = ThreadPoolExecutor(1, "video")


@dataclass(eq=False)
class VideoJob:
    """A video on its way, or what became of it. key: whose it is. about: the fields of the answer that are known from the
    beginning. read: bytes of the frames that it reads. Times are of the clock, in seconds."""

    key: str | None
    about: dict
    fps: float
    read: int
    id: str = field(default_factory=lambda: f"video_{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))
    ticket: Ticket | None = None  # until it is done
    progress: int = 0
    data: bytes | None = None
    error: ApiError | None = None
    ended: int | None = None
    following: asyncio.Task | None = None

    @property
    def status(self) -> str:
        if self.ended is not None:
            return "failed" if self.error else "completed"
        return "in_progress" if self.ticket and self.ticket.begun else "queued"

    @property
    def size(self) -> int:
        return self.read if self.ended is None else len(self.data or b"")

    def answer(self) -> dict:
        done = self.status == "completed"
        error = self.error and {"code": self.error.code or "invalid_request", "message": self.error.detail}
        times = {
            "created_at": self.created,
            "completed_at": self.ended if done else None,
            "expires_at": None if self.ended is None else self.ended + SECONDS,
        }
        return {"id": self.id, "object": "video", "status": self.status, "progress": self.progress, "error": error, **times, **self.about}  # fmt: skip


class Videos:
    """Of the event loop."""

    def __init__(self):
        self.held: dict[str, VideoJob] = {}  # by id, the oldest first

    def check_room(self, plan: AnyPlan) -> None:
        """Raises QueueFullError where those under way, and what this one reads, leave none."""
        self._drop(1, reading(plan))
        if len(self.held) >= COUNT or self._size() + reading(plan) > BYTES:
            raise QueueFullError(AGAIN)

    def begin(self, key: str | None, about: dict, fps: float, ticket: Ticket) -> VideoJob:
        job = VideoJob(key, about, fps, reading(ticket.plan), ticket=ticket)
        self.held[job.id] = job
        job.following = asyncio.create_task(self._follow(job, ticket))
        return job

    def get(self, name: str, key: str | None) -> VideoJob:
        """Raises ApiError, for that of another key as for none."""
        self._drop()
        job = self.held.get(name)
        if job is None or job.key != key:
            message = (
                f"there is no video {shown(name)!r:.80}; it was deleted, is older than an hour, had to give way to newer ones, or "
                "the server has been started again"
            )
            raise ApiError(404, message, "video_id", "video_not_found")
        return job

    def of(self, key: str | None) -> list[VideoJob]:
        """The oldest first."""
        self._drop()
        return [job for job in self.held.values() if job.key == key]

    def delete(self, name: str, key: str | None, engine: EngineThread) -> None:
        """Its rows are free at the next step. Raises ApiError."""
        job = self.get(name, key)
        del self.held[name]
        self._cancel(job, engine)

    def close(self, engine: EngineThread) -> None:
        """Gives all up that are under way: nobody could fetch them."""
        for job in self.held.values():
            self._cancel(job, engine)

    def _cancel(self, job: VideoJob, engine: EngineThread) -> None:
        if job.ticket:
            job.following.cancel()
            engine.cancel([job.ticket])

    async def _follow(self, job: VideoJob, ticket: Ticket) -> None:
        steps, parts = len(ticket.plan.steps), ticket.plan.canvas.grid[0]
        try:
            async for event in ticket:
                if isinstance(event, Step | Decoded):
                    done = event.index + 1 + steps * isinstance(event, Decoded)
                    job.progress = 99 * done // (steps + parts)  # which leaves 1 for the file
            job.data = await asyncio.get_running_loop().run_in_executor(WRITER, as_file, ticket.outputs[-1], job.fps)
            job.progress = 100
        except Exception as error:
            job.error = as_api_error(error)
        job.ended, job.ticket, job.following = int(time.time()), None, None
        self._drop()

    def _drop(self, count: int = 0, size: int = 0) -> None:
        """Forgets what is too old, and of what is done the oldest, until there is room for so many more of so many bytes."""
        now = time.time()
        done = [job for job in self.held.values() if job.ended is not None]
        for job in sorted(done, key=lambda job: job.ended):
            full = len(self.held) + count > COUNT or self._size() + size > BYTES
            if full or job.ended + SECONDS < now:
                del self.held[job.id]

    def _size(self) -> int:
        return sum(job.size for job in self.held.values())


def reading(plan: AnyPlan) -> int:
    """Bytes of the frames that a request reads."""
    frames = [frame for image in plan.images for frame in (*image.vae, *image.vit)]
    return sum(3 * frame.width * frame.height for frame in frames)


def as_file(frames: Sequence[Image.Image], fps: float) -> bytes:
    save_video(frames, file := io.BytesIO(), fps)
    return file.getvalue()
