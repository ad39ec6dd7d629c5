"""One flow step as numbers: what each row of all batches is given, whoever it belongs to."""

import numpy as np

from bagel_opt.options import RENORM_TYPES
from bagel_opt.sampling.adapters import as_inputs
from bagel_opt.sampling.batches import Batches
from bagel_opt.sampling.job import Job


class FlowRows:
    """Arrays over the rows of all batches. A row that takes no part is its own only branch, at time 0, with no tokens.

    kv_len: of what each row has read. The others are those that "generate" and "step" take, under their names
    in programs/signatures.py; `evaluated` is the n of "generate", 0 for a row whose velocity need not be computed.
    """

    def __init__(self, batches: Batches, kv_len: np.ndarray):
        self.batches, self.kv_len = batches, kv_len
        rows, latents = len(kv_len), batches.profile.latents
        self.cond, self.text, self.img = (np.arange(rows) for _ in range(3))
        self.text_scale, self.img_scale, self.renorm_min = (np.zeros(rows, np.float32) for _ in range(3))
        self.dt, self.t = (np.zeros((rows, *batches.config.time_shape(latents)), np.float32) for _ in range(2))
        self.renorm, self.n, self.evaluated = (np.zeros(rows, np.int64) for _ in range(3))
        self.index = np.zeros((rows, latents), np.int64)
        self.position = np.zeros((rows, *batches.config.position_shape(latents)), np.int64)
        self.share = np.zeros((rows, len(batches.runtime.adapters or ())), np.float32)

    def add(self, job: Job) -> None:
        """A request that takes the step it wants: all its branches are evaluated."""
        options, step, at = job.plan.options, job.want, self.batches.at
        for c in job.drawn_from:
            row = at(c)
            self.cond[row], self.text[row], self.img[row] = (at(b) for b in (job.main, job.cfg_text, job.cfg_img))
            self.text_scale[row] = options.cfg_text_scale if step.guided else 0
            self.img_scale[row] = options.cfg_img_scale if step.guided else 0
            self.renorm_min[row], self.renorm[row] = options.cfg_renorm_min, RENORM_TYPES.index(options.cfg_renorm_type)
            self.dt[row], self.n[row], self.share[row] = step.dt, len(job.places), job.share
            if job.clean:
                self.dt[row, : job.clean] = 0
        for c in job.branches():
            row = at(c)
            self.t[row], self.evaluated[row], self.index[row, : len(job.places)] = step.t, len(job.places), job.places
            if job.clean:
                self.t[row, : job.clean] = 0
            self.position[row] = job.target(c).placed(c.position, self.index.shape[1])

    def skip(self, row: int) -> None:
        """A step cache has this row's velocity."""
        self.t[row], self.evaluated[row], self.index[row] = 0, 0, 0

    def evaluation(self, batch: int, size: int | None = None) -> list[np.ndarray]:
        """What "generate" takes after the latents: t, index, position, n, kv_len of one batch, and how much of each adapter
        counts. size: of the latents that it is given, where those are fewer."""
        t, position = self.t, self.position
        if size is not None:  # of arrays that have each token by itself; positions have the markers too
            t, position = t[:, :size] if t.ndim > 1 else t, position[..., : size + 2] if position.ndim > 1 else position
        arrays = t, self.index[:, :size], position, self.evaluated, self.kv_len, *as_inputs(self.share)
        return [self.batches.of(array, batch) for array in arrays]

    def guidance(self) -> list[np.ndarray]:
        """What "step" takes before the latents and velocities."""
        scales = self.text_scale, self.img_scale, self.renorm_min
        return [self.cond, self.text, self.img, *scales, self.renorm, self.dt, self.n]
