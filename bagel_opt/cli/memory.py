"""How much memory a profile needs, from sizes alone, before anything is allocated."""

from bagel_opt.config import BagelConfig
from bagel_opt.dtypes import DTYPES
from bagel_opt.profile import Profile


def needs(config: BagelConfig, profile: Profile, dtype: str, weights: int) -> dict[str, int]:
    """weights: bytes of them. -> bytes of weights, of the KV caches of all batches, and of the largest program's intermediate values.

    The last is an estimate: what is alive at the widest place, which is the MLP of a flow step or of a prefill, or the
    VAE's first level at full resolution. Runtimes add some hundred megabytes of their own.
    """
    c, p, size = config.llm, profile, DTYPES[dtype].bytes
    slot = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size
    tokens = max(p.rows * (p.latents + 2), p.patches + 2, p.text)
    layer = tokens * (3 * c.intermediate_size + 5 * c.hidden_size) * size
    vit = p.patches * (2 * config.vit.intermediate_size + 5 * config.vit.hidden_size) * size
    pixels = p.latents * config.token_pixels**2
    # in the decoder's last blocks: a block's input and two more of its size, the first with the level below's channels
    vae = pixels * config.vae.ch * (max(config.vae.ch_mult[:2]) + 2) * size
    decode = p.rows * c.vocab_size * 4 * 3
    return {
        "weights": weights,
        "caches": p.batches * p.rows * p.slots * slot,
        "workspace": max(layer, vit, vae, decode),
    }
