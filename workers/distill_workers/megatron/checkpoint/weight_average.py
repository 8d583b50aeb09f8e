"""The exponential moving average of the weights, in fp32, which a teacher may be given (teacher.student)."""

import torch


class WeightAverage:
    """After each optimiser step a = decay a + (1 - decay) w, of each parameter of this rank; a is w at the start.

    Replicas hold equal averages, as they hold equal parameters. It is linear, so how parameters are cut and joined
    (shards.py) is that of the weights.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        """`model` has the weights that training starts with."""
        self._model, self._decay = model, decay
        self.values = {name: p.detach().to(torch.float32, copy=True) for name, p in model.named_parameters()}
        """fp32, by the names of the model's parameters."""

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimiser step."""
        for name, parameter in self._model.named_parameters():
            self.values[name].lerp_(parameter.detach().to(torch.float32), 1 - self._decay)
