"""The model's products with weights, and its tables: what a checkpoint fills. C channels in and out, V rows of a table."""

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """x @ weight.T + bias, in the dtype of x: the weight may be stored in another one.

    Every product of the model is one of these, so that what is stored in its place, such as a quantised or an adapted
    weight, is a matter of this file alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.stored(self.weight, x), None if self.bias is None else self.stored(self.bias, x))

    @staticmethod
    def stored(parameter: Tensor, x: Tensor) -> Tensor:
        """A parameter as a product with x takes it."""
        return parameter if parameter.dtype == x.dtype else parameter.to(x.dtype)


class Embedding(nn.Embedding):
    """A table. One without memory has nothing to initialise; torch would import its compiler for that, two seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
