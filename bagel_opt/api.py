"""A loaded model and what it can be asked to do: the public API beside `loading.load`."""

import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from bagel_opt.errors import BundleError, ProfileError
from bagel_opt.examples import Examples
from bagel_opt.lance.config import Config
from bagel_opt.options import Options
from bagel_opt.profile import Profile
from bagel_opt.programs.interface import Runtime
from bagel_opt.request import Picture, Request
from bagel_opt.sampling.adapters import check_adapters
from bagel_opt.sampling.engine import Engine
from bagel_opt.sampling.job import Observer
from bagel_opt.sampling.plan import AnyPlan, fit_profile, fits
from bagel_opt.sampling.planning import make_plan
from bagel_opt.tokenizer import Tokenizer

Drawn = Image.Image | list[Image.Image]  # a picture, or the frames of a video


class Model:
    """A loaded model. `load` makes one; all methods may be called from several threads.

    profiles: the static shapes that requests run in, from small to large. Without any, they are fitted to each call.
    round_up: to coarser sizes, so that compiled programs are used again. examples: to try it with.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: Config,
        tokenizer: Tokenizer,
        profiles: Sequence[Profile] = (),
        round_up: bool = False,
        examples: Examples = Examples(),  # noqa: B008  frozen
    ):
        self.runtime, self.config, self.tokenizer, self.profiles = runtime, config, tokenizer, list(profiles)
        self._round_up, self._examples, self._process = round_up, examples, os.getpid()
        self._running, self._counting = 0, threading.Lock()

    def __setstate__(self, state: dict):
        """A pickled model may go to any process, where it is one of its own."""
        vars(self).update(state, _process=os.getpid(), _running=0, _counting=threading.Lock())

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_counting"}

    @property
    def examples(self) -> Examples:
        """Prompts, and a picture to edit and to ask about, that the model's folder gives."""
        return self._examples

    @property
    def defaults(self) -> Options:
        """The options of a request that gives none: the official ones, but for what the model recommends."""
        return Options.make(dict(self.config.generation))

    @property
    def profile(self) -> Profile | None:
        """The largest of the profiles, if there are any."""
        return self.profiles[-1] if self.profiles else None

    def set_adapters(self, adapters: "Mapping[str, str | Path | tuple[str | Path, float]]") -> None:
        """Keeps LoRA adapters apart from the weights, by name, in place of those that were kept before.

        Each is a file or a folder as peft writes it, or (file, factor). A request has all of them, each as often as its factor
        says (1 unless given), or those that its option `adapters` names: {name: scale}. Requests with different adapters share
        batches. Of a compiled model nothing is compiled anew for adapters that need no more ranks than those before.

        Raises FileNotFoundError and CheckpointError for an adapter that is none of this model, ValueError for a bad argument,
        BundleError for a bundle, whose weights are fixed, and RuntimeError while requests are on their way. Then those before
        stay. Where the device has too little memory none is kept, and what torch says of that is raised.
        """
        if self.runtime.adapters is None:
            raise BundleError("a bundle's weights are fixed; export it with lora=, --lora, or load the checkpoint")
        with self._counting:
            if self._running:
                raise RuntimeError("requests are on their way; set adapters when they have ended")
            self.runtime.set_adapters(adapters)

    def close(self) -> None:
        """Ends the processes of a model on several GPUs, which end with this one or with the model itself, too. It answers
        nothing afterwards."""
        self.runtime.close()

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        with self._counting:
            self._running += 1
        try:
            yield
        finally:
            with self._counting:
                self._running -= 1

    def run(self, inputs: "str | Picture | Sequence[str | Picture]", **options: Any) -> list[str | Drawn]:
        """Reads texts and pictures in order and answers with a text, a picture, a thought and a picture, or, with
        output="interleaved", texts and pictures in turn; with output="video", a list of frames.

        inputs: a str is a text; a picture is a PIL image, a `Path`, or a file's bytes. options: see
        `bagel_opt.request.Options`; and `video`, frames as PIL images, a file's path or its bytes, which is read after them. Raises ValueError for bad options, for files that are no pictures and for a request
        beyond the model's or the profile's sizes, FileNotFoundError for a file that is not there, TypeError for other inputs.
        """
        return self.run_many([Request(inputs, **options)])[0]

    def run_many(
        self,
        requests: Iterable[Request],
        return_exceptions: bool = False,
        observers: Sequence[Observer | None] | None = None,
    ) -> list[list[str | Drawn]]:
        """Runs requests of any sizes and options together in common rows; each answer is what the request gets alone.

        Bad requests are refused before any runs. One that fails on its way loses nobody else's work: the others
        finish first, then the failure is raised, or with `return_exceptions` returned in its place. observers: of each
        request, in place of its options' on_step and on_token.
        """
        if isinstance(requests, Request) or not isinstance(requests, Iterable):
            raise TypeError(f"requests is {type(requests).__name__}; allowed is a list of bagel_opt.Request")
        requests = list(requests)
        observers = [None] * len(requests) if observers is None else list(observers)
        if len(observers) != len(requests):
            raise ValueError(
                f"observers has {len(observers)}; allowed: one, or None, for each of {len(requests)} requests"
            )
        with self._under_way():
            return self._run_many(requests, return_exceptions, observers)

    def _run_many(
        self, requests: list[Request], return_exceptions: bool, observers: list[Observer | None]
    ) -> list[list[str | Drawn]]:
        groups = defaultdict(list)
        for number, request in enumerate(requests):
            if not isinstance(request, Request):
                raise TypeError(f"requests[{number}] is {type(request).__name__}; allowed is bagel_opt.Request")
            try:
                profile, plan = self.choose(make_plan(request, self.config, self.tokenizer))
            except ValueError as error:
                raise type(error)(f"request {number}: {error}" if len(requests) > 1 else str(error)) from None
            groups[profile].append((number, plan))
        results: list = [None] * len(requests)
        for profile, members in groups.items():
            numbers, plans = zip(*members, strict=True)
            engine = self._fitted(plans) if profile is None else self._engine(profile)
            watching = [observers[number] for number in numbers]
            for number, result in zip(numbers, engine.run(plans, watching), strict=True):
                results[number] = result
        failures = [result for result in results if isinstance(result, Exception)]
        if failures and not return_exceptions:
            raise failures[0]
        return results

    def _engine(self, profile: Profile) -> Engine:
        return Engine(self.runtime.for_profile(profile), self.config, self.tokenizer, profile)

    def _fitted(self, plans: list[AnyPlan]) -> Engine:
        """Of the profile for these requests together, with as many rows as there is memory for: where that is short, they take
        turns. Raises ProfileError."""
        most = 8 if any(plan.draws for plan in plans) else 16  # a token reads the weights for all rows
        contexts = [plan.contexts() for plan in plans]
        while True:
            profile = fit_profile(plans, self._round_up, most)
            try:
                engine = self._engine(profile)
            except ProfileError:
                if profile.rows == 1:
                    raise
                most = profile.rows - 1
                continue
            try:
                engine.batches.reserve(max(contexts), sum(contexts))
            except MemoryError:
                if profile.rows > 1:
                    most = profile.rows // 2
                    continue
            return engine  # with one row at a time, what has no room ends by itself

    def choose(self, plan: AnyPlan) -> tuple[Profile | None, AnyPlan]:
        """The smallest profile that holds all branches of a request in one batch, else the smallest that it fits, and the
        plan as that profile runs it. Raises ProfileError where there is none, on what the largest lacks, and RuntimeError
        in a fork of the process that loaded the model, which has none of the threads that its runtime would wait for."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this model was loaded in process {self._process}, of which this one is a fork; load it in each process, and "
                "start those that are given it with multiprocessing.get_context('spawn')"
            )
        check_adapters(self.runtime, plan.options)
        if not self.profiles:
            return None, plan
        fitting = [profile for profile in self.profiles if fits(plan, profile)]
        whole = [profile for profile in fitting if profile.rows >= plan.contexts()]
        chosen = (whole or fitting or self.profiles[-1:])[0]
        return chosen, plan.fitted(chosen)

    def generate(self, prompt: str, image: "str | Picture | None" = None, **options: Any) -> Drawn:
        """Draws a picture from a text, or with output="video" a video as a list of frames, which may begin with an image."""
        output = "video" if options.get("output") == "video" else "image"
        if image is not None and output == "image":
            raise ValueError("image is the first frame of a video: give output='video' with it, or use edit")
        inputs = [_text(prompt, "prompt"), *([] if image is None else [_picture(image)])]
        with _naming_image():
            return self.run(inputs, **_fixed(options, output=output))[-1]

    def edit(
        self, image: "str | Picture | None" = None, instruction: str | None = None, *, video: Any = None, **options: Any
    ) -> Drawn:
        """Draws a changed picture, of the input image's size as it is read, which size="input" makes its own; or a changed
        video. image: a PIL image, a file's path or its bytes; video: frames, a file's path or its bytes."""
        inputs = [*_shown(image, video), _text(instruction, "instruction")]
        with _naming_image():
            return self.run(inputs, video=video, **_fixed(options, output="image" if video is None else "video"))[-1]

    def understand(
        self, image: "str | Picture | None" = None, question: str | None = None, *, video: Any = None, **options: Any
    ) -> str:
        """Answers a question about a picture: a PIL image, a file's path or its bytes; or about a video: frames, a path, bytes."""
        inputs = [*_shown(image, video), _text(question, "question")]
        with _naming_image():
            return self.run(inputs, video=video, **_fixed(options, output="text"))[-1]

    def chat(self, text: str, **options: Any) -> str:
        """Answers a text."""
        return self.run([_text(text, "text")], **_fixed(options, output="text"))[-1]


def _shown(image: "str | Picture | None", video: Any) -> list[Picture]:
    return [] if image is None and video is not None else [_picture(image)]


@contextmanager
def _naming_image() -> Iterator[None]:
    """What is wrong with the picture among a method's inputs is said of its argument `image`."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        place = re.match(r"inputs\[\d\]: ", str(error))
        if not place:
            raise
        raise type(error)(f"image: {str(error)[place.end() :]}") from None


def _picture(image: str | Picture) -> Picture:
    if not isinstance(image, str | Picture):
        raise TypeError(f"image is {type(image).__name__}; allowed are PIL.Image.Image, a file's path and bytes")
    if image == "":
        raise ValueError("image is ''; allowed are PIL.Image.Image, a file's path and bytes")
    return Path(image) if isinstance(image, str) else image  # a str among inputs would be a text


def _text(text: str, name: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{name} is {type(text).__name__}; allowed is str")
    return text


def _fixed(options: dict, output: str) -> dict:
    if options.get("output", output) != output:
        raise ValueError(f"output={options['output']!r}; this method's output is always {output!r}; use run")
    return {**options, "output": output}
