"""The command line: `bagel-opt`, or `python -m bagel_opt`."""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import secrets
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from bagel_opt.api import Model
from bagel_opt.cli.arguments import parser
from bagel_opt.cli.benching import bench
from bagel_opt.cli.console import bar, console, guarded, notes, say, tables
from bagel_opt.cli.doctor import examine
from bagel_opt.cli.doctor import show as show_facts
from bagel_opt.cli.inspect import look
from bagel_opt.cli.model_arguments import load_settings
from bagel_opt.cli.serving import replica_settings, server_settings
from bagel_opt.cli.terminal import again, show
from bagel_opt.export.recipe import load_recipe, recipe_names
from bagel_opt.files.replacing import check_place, replacing, save_picture
from bagel_opt.images import check_image, open_picture
from bagel_opt.loading import load, shipped_model
from bagel_opt.options import DEFAULT_TOKENS, FPS, Options
from bagel_opt.profile import Profile, profile_names
from bagel_opt.videos import save_video


def main(argv: list[str] | None = None) -> int:
    """Runs a command; the exit status: 0 for success, 1 for an error, which is one line on stderr, 2 for bad usage."""
    arguments = parser(COMMANDS).parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else argv
    # the server's log is JSON, and the doctor tells of all that is logged
    with contextlib.nullcontext() if arguments.run in (serve, doctor) else notes():
        return guarded(lambda: arguments.run(arguments))


# ---- commands


def generate(a: argparse.Namespace) -> None:
    if a.image and a.drawn == "image":
        raise ValueError("--image is what a video begins with: give --output video with it, or use edit")
    _draw(a, lambda: [a.prompt, *([_open(a.image)] if a.image else [])], a.drawn)


def edit(a: argparse.Namespace) -> None:
    _draw(a, lambda: [*_shown(a), a.prompt], "video" if a.video else "image")


def understand(a: argparse.Namespace) -> None:
    say(_run(a, [*_shown(a), a.prompt], "text")[0])


def chat(a: argparse.Namespace) -> None:
    say(_run(a, [a.prompt], "text")[0])


def interleave(a: argparse.Namespace) -> None:
    """Texts go to stdout as they are written, and the paths of pictures as they are drawn."""
    a.out = a.out or Path("out.png")
    _check_out(a.out)
    inputs, paths = [_open(item) if _is_picture(item) else item for item in a.inputs], []

    def tell(output: str | Image.Image) -> None:
        if isinstance(output, str):
            return say(output)
        paths.append(a.out.with_stem(f"{a.out.stem}-{len(paths) + 1}"))
        save_picture(output, paths[-1])
        show(output)
        print(paths[-1])

    _with_seed(a)
    _run(a, inputs, "interleaved", tell)
    sys.stdout.flush()  # before what follows on stderr
    print(f"again: {again(a)}", file=sys.stderr)


SETTINGS = ("format", "dtype", "attention", "device", "quantization")  # of an export, which a recipe may have too


def export(a: argparse.Namespace) -> None:
    from bagel_opt.export import export as write_bundle
    from bagel_opt.export.bundle import check_settings

    options = dataclasses.asdict(load_recipe(a.recipe)) if a.recipe else {}
    options |= {name: getattr(a, name) for name in SETTINGS if getattr(a, name)}
    profiles = a.profile or options.get("profiles")
    options.pop("profiles", None)
    if not profiles:
        check_settings(
            **{name: options[name] for name in SETTINGS[:-1] if name in options}
        )  # before a line on the profile hides what is wrong
        profiles = [_default_profile(a.checkpoint, a.weights)]
    with bar("exporting") as update:
        options |= {"weights": a.weights, "lora": a.lora, "verify": a.verify}
        folder = write_bundle(a.checkpoint, a.out, profiles, progress=update, **options)
    print(folder)


def quantize(a: argparse.Namespace) -> None:
    try:
        from bagel_opt.export.quantize import quantize as write_checkpoint
    except ImportError as error:
        raise ImportError(f"quantising needs {error.name}: pip install 'bagel-opt[torch]'") from None
    with bar("quantising") as update:
        progress = functools.partial(update, "quantising")
        given = {"weights": a.weights, "lora": a.lora, "progress": progress}
        print(write_checkpoint(a.checkpoint, a.out, a.quantization, **given))


def convert(a: argparse.Namespace) -> None:
    try:
        from bagel_opt.files.convert import convert as write_vae
    except ImportError as error:
        raise ImportError(f"converting needs {error.name}: pip install 'bagel-opt[torch]'") from None
    print(write_vae(a.checkpoint, a.out))


def _default_profile(checkpoint: str | None, weights: str | None) -> Profile:
    """The profile where none was named, with a line on stderr saying which."""
    from bagel_opt.sampling.default_profile import default_profile

    try:
        from bagel_opt.files.checkpoint import Checkpoint
    except ImportError as error:
        raise ImportError(f"exporting needs {error.name}: pip install 'bagel-opt[export]'") from None
    config = Checkpoint(shipped_model() if checkpoint is None else checkpoint, weights).config
    profile, side = default_profile(config), config.default_size
    sizes = f"{profile.rows} rows of {profile.slots} slots, {profile.latents} latents, {profile.patches} patches"
    console.print(
        f"no profile was named: taking {profile.name!r}, for pictures and edits up to {side}x{side} ({sizes}); "
        f"others are --profile {'|'.join(profile_names())} or --recipe {'|'.join(recipe_names())}"
    )
    return profile


def serve(a: argparse.Namespace) -> None:
    try:
        import bagel_opt.serve as server
    except ImportError as error:
        raise ImportError(f"{error}; the server needs: pip install 'bagel-opt[serve]'") from None

    if a.replicas is None:
        for name in ("max_replicas", "requests_per_replica", "cpus_per_replica", "gpus_per_replica"):
            if getattr(a, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for replicas; give --replicas too")
        settings = server_settings(a)
        server.log_as_json()
        bound = server.bind(a.host, a.port)
        server.serve(_load(a), settings.pop("names"), a.host, a.port, bound, **settings)
        return
    try:
        from bagel_opt.serve.replicas import serve_replicas
    except ImportError as error:
        raise ImportError(f"{error}; replicas need: pip install 'bagel-opt[ray]'") from None
    serve_replicas(**replica_settings(a), host=a.host, port=a.port)


def inspect(a: argparse.Namespace) -> None:
    output = tables()
    for table in look(a.checkpoint, a.profile, a.dtype, a.check, a.weights, a.lora, a.memory, a.quantization):
        output.print(table)


def doctor(a: argparse.Namespace) -> None:
    found = examine()
    if a.json:
        print(json.dumps(found, indent=1))
    else:
        show_facts(found, tables())


def _draw(a: argparse.Namespace, inputs: Callable[[], list], output: str) -> None:
    """Draws and shows a picture or a video. On stdout are the thoughts and its path alone."""
    a.out = a.out or Path("out.mp4" if output == "video" else "out.png")
    _check_out(a.out, output)
    _with_seed(a)
    *thoughts, drawn = _run(a, inputs(), output)
    for thought in thoughts:
        say(thought)
    if output == "video":
        with replacing(a.out) as partial:
            save_video(drawn, partial, getattr(a, "fps", FPS))
    else:
        save_picture(drawn, a.out)
    show(drawn[0] if output == "video" else drawn)
    print(a.out, flush=True)  # before what follows on stderr
    print(f"again: {again(a)}", file=sys.stderr)


def _with_seed(a: argparse.Namespace) -> None:
    """Draws one where none was given, so that it can be named."""
    a.seed_drawn = not hasattr(a, "seed")
    if a.seed_drawn:
        a.seed = secrets.randbits(32)


def _run(
    a: argparse.Namespace, inputs: list, output: str, tell: Callable[[object], None] = lambda output: None
) -> list:
    """The outputs; tell(output) is called as each is there, with no progress bar in its way."""
    options = {name: getattr(a, name) for name in Options.__dataclass_fields__ if hasattr(a, name)}
    if "cfg_interval" in options:
        options["cfg_interval"] = tuple(options["cfg_interval"])
    options["output"] = output
    Options.make(options)  # a typing slip should not cost the loading of 29 GB
    model = _load(a)
    longest = options.get("max_think_tokens") or model.defaults.max_think_tokens or DEFAULT_TOKENS
    if vars(a).get("video"):
        options["video"] = a.video
    with bar("writing" if output == "text" else "denoising") as update:

        def on_step(event: object) -> None:
            update("denoising", event.index + 1, event.total)

        written = []

        def on_token(token: int) -> None:
            written.append(token)
            update("writing", len(written), longest)

        def on_output(output: object) -> None:
            written.clear()
            with update.aside():
                tell(output)

        return model.run(inputs, on_step=on_step, on_token=on_token, on_output=on_output, **options)


def _load(a: argparse.Namespace) -> Model:
    with bar("loading") as update:
        progress = functools.partial(update, "loading")
        return load(a.checkpoint, profile=a.profile, progress=progress, **load_settings(a))


def _shown(a: argparse.Namespace) -> list[Image.Image]:
    """The picture of a command; none where there is a video."""
    if a.image is None and a.video is None:
        raise ValueError("give a picture's file and then the text, or --video FILE and the text")
    if a.image is not None and a.video is not None:
        raise ValueError("give a picture's file, or --video FILE; not both")
    return [] if a.image is None else [_open(a.image)]


def _open(path: str) -> Image.Image:
    try:
        with warnings.catch_warnings():  # of Pillow, on what it took all the same
            warnings.simplefilter("ignore")
            image = open_picture(path, "image")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no picture {path or repr(path)}; its file comes first, then the text"
        ) from None
    check_image(image, "image")
    return image


def _is_picture(item: str) -> bool:
    """Whether it names a picture, there or not, and is no text."""
    named = Path(item).suffix.lower() in Image.registered_extensions() and not any(map(str.isspace, item))
    return named or os.path.isfile(item)  # which, of a long text, is no error


def _check_out(path: Path, output: str = "image") -> None:
    """A typing slip should not cost the drawing of a picture."""
    if output == "video":
        if path.suffix.lower() != ".mp4":
            raise ValueError(f"--out {path}: the name of a video must end in .mp4")
    elif Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {path}: the name must end in .png, .jpg or .webp")
    check_place(path, "--out")


COMMANDS = {
    run.__name__: run
    for run in (generate, edit, understand, chat, interleave, export, quantize, convert, bench, serve, inspect, doctor)
}
