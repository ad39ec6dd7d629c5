"""The public API: load a checkpoint or a bundle, then run requests."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from bagel_opt.config import BagelConfig
from bagel_opt.errors import BundleError
from bagel_opt.profile import Profile, load_profile
from bagel_opt.request import Request
from bagel_opt.runtime.base import Runtime
from bagel_opt.sampling.engine import Engine
from bagel_opt.sampling.plan import Plan, fit_profile, make_plan
from bagel_opt.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

BACKENDS = ("eager", "compile")


class Model:
    """A loaded model. `load` makes one; all methods may be called from several threads.

    profiles: the static shapes that requests run in, from small to large. Without any, they are fitted to each call.
    round_up: to coarser sizes, so that compiled programs are used again.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: BagelConfig,
        tokenizer: Tokenizer,
        profiles: Sequence[Profile] = (),
        round_up: bool = False,
    ):
        self.runtime, self.config, self.tokenizer, self.profiles = runtime, config, tokenizer, list(profiles)
        self._round_up = round_up

    @property
    def profile(self) -> Profile | None:
        """The largest of the profiles, if there are any."""
        return self.profiles[-1] if self.profiles else None

    def run(self, inputs: "str | Image.Image | Sequence[str | Image.Image]", **options: Any) -> list[str | Image.Image]:
        """Reads texts and PIL images in order and answers with a text, a picture, or a thought and a picture.

        options: see `bagel_opt.request.Options`. Raises ValueError for bad options and for a request beyond the
        model's or the profile's sizes, TypeError for inputs that are neither str nor PIL image.
        """
        return self.run_many([Request(inputs, **options)])[0]

    def run_many(self, requests: Iterable[Request], return_exceptions: bool = False) -> list[list[str | Image.Image]]:
        """Runs requests of any sizes and options together in common rows; each answer is what the request gets alone.

        Bad requests are refused before any runs. One that fails on its way loses nobody else's work: the others
        finish first, then the failure is raised, or with `return_exceptions` returned in its place.
        """
        requests, groups = list(requests), defaultdict(list)
        for number, request in enumerate(requests):
            if not isinstance(request, Request):
                raise TypeError(f"requests[{number}] is {type(request).__name__}; allowed is bagel_opt.Request")
            try:
                plan = make_plan(request, self.config, self.tokenizer)
                profile = self.choose(plan)
            except ValueError as error:
                raise type(error)(f"request {number}: {error}" if len(requests) > 1 else str(error)) from None
            groups[profile].append((number, plan))
        results: list = [None] * len(requests)
        for profile, members in groups.items():
            numbers, plans = zip(*members, strict=True)
            profile = profile or fit_profile(plans, self._round_up)
            engine = Engine(self.runtime.for_profile(profile), self.config, self.tokenizer, profile)
            for number, result in zip(numbers, engine.run(plans), strict=True):
                results[number] = result
        failures = [result for result in results if isinstance(result, Exception)]
        if failures and not return_exceptions:
            raise failures[0]
        return results

    def choose(self, plan: Plan) -> Profile | None:
        """The smallest profile that holds all branches of a request in one batch, else the smallest that it fits. Raises
        ProfileError where there is none, on what the largest lacks."""
        if not self.profiles:
            return None
        fitting = [profile for profile in self.profiles if plan.fits(profile)]
        whole = [profile for profile in fitting if profile.rows >= plan.contexts()]
        chosen = (whole or fitting or self.profiles[-1:])[0]
        plan.check(chosen)
        return chosen

    def generate(self, prompt: str, **options: Any) -> Image.Image:
        """Draws a picture from a text."""
        return self.run([prompt], **_fixed(options, output="image"))[-1]

    def edit(self, image: Image.Image, instruction: str, **options: Any) -> Image.Image:
        """Draws a changed picture of the input image's size."""
        return self.run([image, instruction], **_fixed(options, output="image"))[-1]

    def understand(self, image: Image.Image, question: str, **options: Any) -> str:
        """Answers a question about a picture."""
        return self.run([image, question], **_fixed(options, output="text"))[-1]

    def chat(self, text: str, **options: Any) -> str:
        """Answers a text."""
        return self.run([text], **_fixed(options, output="text"))[-1]


def _fixed(options: dict, output: str) -> dict:
    if options.get("output", output) != output:
        raise ValueError(f"output={options['output']!r}; this method's output is always {output!r}; use run")
    return {**options, "output": output}


def load(
    source: str | Path | None = None,
    *,
    backend: str = "eager",
    device: "str | torch.device | None" = None,
    dtype: "str | torch.dtype | None" = None,
    attention: str = "auto",
    profile: "Profile | str | Path | None" = None,
    check: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Model:
    """Loads a checkpoint folder, a Hugging Face repo id or a bundle folder; None is the model that ships.

    backend: "eager" or "compile"; a bundle brings its own. device: default CUDA where there is one.
    dtype: default bfloat16 on CUDA, else float32. attention: "auto", "sdpa", "cudnn", "flex" or "flash".
    profile: a Profile, a TOML file or a name; None fits the shapes to each call. check: compare a bundle's files with
    their sha256, which takes a while where they are huge. progress(done, total) in tensors or files.

    Raises FileNotFoundError for what is missing, CheckpointError or BundleError for what cannot be read, ValueError
    for a bad argument and ImportError for a missing package.
    """
    folder = Path(source) if source is not None else shipped_model()
    if (folder / "manifest.json").is_file():
        given = {"dtype": dtype, "profile": profile, "attention": None if attention == "auto" else attention}
        for name, value in given.items():
            if value is not None:
                raise BundleError(f"{name}={value!r}: a bundle's {name} was fixed when it was exported; leave it out")
        from bagel_opt.bundle import load_bundle

        return load_bundle(folder, backend, device, progress, check)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; allowed for a checkpoint are {', '.join(map(repr, BACKENDS))}")
    try:
        import torch
    except ImportError:
        raise ImportError(f"{folder} is a checkpoint, which needs torch: pip install 'bagel-opt[torch]'") from None

    from bagel_opt.checkpoint import Checkpoint
    from bagel_opt.model import attention as backends
    from bagel_opt.runtime.torch import TorchRuntime

    where = torch_device(device)
    kind = torch_dtype(dtype, torch.bfloat16 if where.type == "cuda" else torch.float32)
    chosen = backends.choose(attention, where, kind)
    fixed = [load_profile(profile)] if profile is not None else []
    checkpoint = Checkpoint(folder if source is None else source)
    model = checkpoint.load(where, kind, progress)
    model.set_backend(chosen)
    runtime = TorchRuntime(model, where, kind, compiled=backend == "compile")
    return Model(
        runtime, checkpoint.config, checkpoint.tokenizer, fixed, round_up=backend == "compile" or chosen == "flex"
    )


def shipped_model() -> Path:
    """The checkpoint used when none is named: small, of flat shapes on plain backgrounds, made by bagel_opt.demo.train."""
    return Path(__file__).parent / "demo" / "checkpoint"


def torch_device(device: "str | torch.device | None") -> "torch.device":
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r}; allowed are 'cpu', 'cuda' and 'cuda:N'")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}, but this torch finds no CUDA device; use device='cpu'")
    return chosen


def torch_dtype(dtype: "str | torch.dtype | None", default: "torch.dtype") -> "torch.dtype":
    import torch

    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is None:
        return default
    if dtype in allowed.values():
        return dtype
    if str(dtype) not in allowed:
        raise ValueError(f"dtype={str(dtype)!r}; allowed are {', '.join(map(repr, allowed))}")
    return allowed[str(dtype)]
