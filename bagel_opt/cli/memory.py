"""What a plan for a card's memory says, as tables."""

from rich.table import Table

from bagel_opt.profile import Profile
from bagel_opt.runtime.memory_plan import EXPERTS, MemoryPlan, size_text

NAMES = {
    "und": "understanding expert",
    "gen": "generation expert",
    "embed": "embeddings",
    "head": "head, for the logits of a token",
    "vit": "ViT, its connector and positions",
    "vae_encode": "VAE, encoder",
    "vae_decode": "VAE, decoder",
    "rest": "norms, latents, time",
}
COMES = {"embed": "read over the link, some rows", "head": "read over the link for each token"}
LINKS = {"PCIe 3.0 x16": 12, "PCIe 4.0 x16": 25, "PCIe 5.0 x16": 55}  # GB/s of page-locked copies


def plan_tables(plan: MemoryPlan, profile: Profile) -> list[Table]:
    """Where the weights lie, and what that costs over links of some speeds."""
    rows, latents = min(profile.rows, 2), profile.latents
    places = Table(
        title=f"memory of {size_text(plan.memory)}, profile {profile.name}", title_justify="left", title_style="bold"
    )
    for column in ("part", "on the GPU", "on the host", ""):
        places.add_column(column, justify="left" if column in ("part", "") else "right")
    for part, count in plan.parts.items():
        host, how = count if part in plan.away else 0, COMES.get(part, "comes for each picture and goes")
        if part in EXPERTS:
            layers, every = plan.streamed[part], plan.config.llm.num_hidden_layers
            host = plan.streams(part)
            how = f"{len(layers)} of {every} layers stream, by turns in two buffers of {size_text(plan.layer(part))}"
        places.add_row(NAMES[part], size_text(count - host), size_text(host), how if host else "")
    places.add_row("buffers", size_text(plan.resident + plan.host - sum(plan.parts.values())), "", "")
    places.add_row("caches, intermediate values", size_text(plan.room), "", "")
    places.add_row("CUDA and its libraries, about", size_text(plan.reserve), "", "")
    places.add_section()
    places.add_row("together", size_text(plan.memory), size_text(plan.host), "")
    times = Table(
        title=f"predicted, for a GPU that computes like an H100: {rows} rows of {latents} latents",
        title_justify="left",
        title_style="bold",
    )
    for column in ("link", "speed", "a flow step", "of which copies, meanwhile", "copies for a token of a text"):
        times.add_column(column, justify="left" if column == "link" else "right")
    for name, speed in LINKS.items():
        step = plan.step_seconds(speed * 1e9, rows, latents)
        copies = (count / speed / 1e6 for count in (plan.step_bytes, plan.token_bytes))
        times.add_row(name, f"{speed} GB/s", f"{1000 * step:.3g} ms", *(f"{ms:.3g} ms" for ms in copies))
    return [places, times]
