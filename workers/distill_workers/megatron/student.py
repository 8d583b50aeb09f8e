"""The student, the trainer's interface to Megatron: one optimiser step on samples, log-probs, weights out, exact
checkpoints.

Every method but the constructor's reading of files is collective: all ranks call it, in the same order, with the same
arguments. A step is `accumulate` for each group of samples as it arrives, then `update`. The loss of a micro-batch is
that of micro_batch_loss.py.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from distill_api.spec.job_spec import Spec
from distill_api.teacher.student import average_decay
from distill_api.training_phases import objectives
from distill_workers.data.sample import Sample
from distill_workers.megatron import lora, memory, parallel, pipeline
from distill_workers.megatron.architecture import read_shape
from distill_workers.megatron.batch import MicroBatch, cost, micro_batches, share, split
from distill_workers.megatron.checkpoint import hugging_face, state
from distill_workers.megatron.checkpoint.host_copies import HostCopies
from distill_workers.megatron.checkpoint.weight_average import WeightAverage
from distill_workers.megatron.checkpoint.writer import CheckpointWriter
from distill_workers.megatron.context import own_tokens
from distill_workers.megatron.logprobs import Vocabulary, token_logprobs
from distill_workers.megatron.micro_batch_loss import micro_batch_loss
from distill_workers.megatron.model import build_model
from distill_workers.objective.coefficients import StepCoefficients, step_coefficients
from distill_workers.objective.statistics import SCOPES, means, no_sums


class MegatronStudent:
    """The model that is trained, split over tensor x context x data x pipeline parallel ranks; experts over replicas.

    Megatron's DistributedDataParallel accumulates gradients in fp32; its AdamW works on fp32 main parameters when the
    model is in bf16: all of them on each data parallel rank or, with optimizer.distributed, a part. The gradient is
    the sum over tokens, divided in `update` by the response tokens of the global batch: it does not depend on the split
    into micro-batches, groups or ranks.
    """

    _sums: torch.Tensor
    """[statistics, 2] of what `update` reports, over this rank's tokens of the step."""
    _positions: torch.Tensor
    """The positions that this rank has computed in the step, padding included."""
    _loads: list[int]
    """The cost of what each replica was given in the step."""
    _samples: int
    _tokens: int
    _local_tokens: int
    _used: int

    def __init__(self, spec: Spec, model_path: Path) -> None:
        """Join the other ranks and read the checkpoint in the folder. On a CPU, cpu.megatron_shim comes first.

        Raises UnsupportedModel (architecture.py) for a model or a split that cannot be trained.
        """
        self.spec = spec
        self.model_path = model_path
        self.ranks = parallel.initialise(
            spec.trainer.parallelism,
            on_cpu=spec.on_cpu,
            # Ranks wait in a collective while rank 0 waits for rollouts.
            timeout_seconds=spec.stall_timeout_seconds,
        )
        self._limit = spec.trainer.max_tokens_per_micro_batch * self.ranks.context_size
        self.shape = read_shape(model_path, trust_remote_code=spec.trust_remote_code)
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        torch.manual_seed(spec.seed)
        self._lora = spec.trainer.lora
        self._model = build_model(
            self.shape,
            self.ranks,
            self.dtype,
            seed=spec.seed,
            fused=self._lora is None,
            recompute=spec.trainer.recompute,
            sequence_parallel=spec.trainer.parallelism.sequence,
        )
        hugging_face.load(self._model, self.shape, self.ranks, model_path)
        if self._lora is not None:
            lora.attach(self._model, self.shape, self.ranks, self._lora, spec.seed)
        self._parallel_model = DistributedDataParallel(
            self._model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=False,
                use_distributed_optimizer=spec.trainer.optimizer.distributed,
            ),
            self._model,
        )
        self._optimizer = get_megatron_optimizer(
            _optimizer_config(spec, self.dtype), [self._parallel_model], use_gloo_process_groups=False
        )
        for group in self._optimizer.param_groups:
            # Megatron leaves this to its scheduler, which is not used: without it norms and biases would decay as well.
            group["weight_decay"] = spec.trainer.optimizer.weight_decay * group["wd_mult"]
        memory.fuse(self._optimizer, self.ranks.device)
        rows = self.shape.padded_vocab_size(self.ranks.tensor_size) // self.ranks.tensor_size
        start = self.ranks.tensor_rank * rows
        self._vocabulary = Vocabulary(
            start=start,
            rows=min(rows, self.shape.vocab_size - start),
            group=self.ranks.tensor_group if self.ranks.tensor_size > 1 else None,
        )
        decay = average_decay(spec)
        self._average = None if decay is None else WeightAverage(self._model, decay)
        self.writer = CheckpointWriter()
        self._copies = HostCopies() if self.ranks.device.type == "cuda" else None
        self._objectives = objectives(spec)
        self._first_coefficients: StepCoefficients = step_coefficients(self._objectives[0], 0)
        self._coefficients = self._first_coefficients
        self._begin_step()

    def discard(self) -> None:
        """Forget what was accumulated since the last `update`."""
        self._begin_step()

    def accumulate(self, samples: Sequence[Sample], coefficients: StepCoefficients | None = None) -> None:
        """Forward and backward of some samples of the step. No communication between replicas, but where they share
        sequences or experts.

        coefficients: of the step, the same in all its calls; without them those of a run's first step.
        """
        coefficients = coefficients or self._first_coefficients
        if self._samples and coefficients != self._coefficients:
            raise ValueError(f"a step has one pair of coefficients: {self._coefficients}, and now {coefficients}")
        self._coefficients, objective = coefficients, self._objectives[coefficients.phase]
        shares = share(samples, self._loads, self._limit)
        for rank, indices in enumerate(shares):
            self._loads[rank] += cost(samples, indices, self._limit)
            self._used += sum(samples[i].tokens for i in indices)
        self._samples += len(samples)
        self._tokens += sum(s.trained_tokens for s in samples)

        def loss(batch: MicroBatch, hidden: torch.Tensor) -> torch.Tensor:
            own = own_tokens(batch, len(hidden), self.ranks)
            at_responses, head = hidden.flatten(0, 1)[own.rows], self._model.head_weight()
            parts = (batch, own, at_responses, head, self._vocabulary)
            summed, sums = micro_batch_loss(objective, coefficients, *parts)
            self._sums = self._sums + sums
            self._positions = self._positions + batch.input_ids.numel() + len(batch.order)
            self._local_tokens += len(own.rows)
            return summed

        pipeline.run(self._parallel_model, self._batches(samples, shares), loss, backward=True)

    def update(self, learning_rate: float) -> dict[str, float]:
        """One optimiser step with the gradients of every `accumulate` since the last. The same result on every rank.

        Means over the tokens of the global batch that each is of, left out without any: statistics.SCOPES. And:
        grad_norm before clipping, learning_rate, coefficient and reward_coefficient, tokens (of responses), samples,
        padding_ratio (share of the computed positions that are padding), skipped (1 when nothing was updated: there
        were no tokens, or the gradient was not finite).
        """
        totals = torch.cat([self._sums.flatten(), self._positions[None]])
        dist.all_reduce(totals, group=self.ranks.data_group)
        if self.ranks.pipeline_size > 1:
            # The last stage counts; the others add zeros.
            dist.all_reduce(totals, group=self.ranks.pipeline_group)
        positions = totals[-1].item()
        local_tokens = torch.tensor(self._local_tokens, dtype=torch.int, device=self.ranks.device)
        finalize_model_grads([self._parallel_model], num_tokens=local_tokens)
        stats = means(totals[:-1].view(len(SCOPES), 2))
        stats |= {
            "tokens": float(self._tokens),
            "samples": float(self._samples),
            "padding_ratio": 1 - self._used / positions if positions else 0.0,
            "learning_rate": learning_rate,
            "coefficient": self._coefficients.divergence,
            "reward_coefficient": self._coefficients.reward,
            "grad_norm": 0.0,
            "skipped": 1.0,
        }
        if self._tokens and self._gradient_is_finite():
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            _, grad_norm, _ = self._optimizer.step()
            if self._average is not None:
                self._average.update()
            stats |= {"grad_norm": float(grad_norm), "skipped": 0.0}
        self._begin_step()
        return stats

    @torch.no_grad()
    def logprobs(self, samples: Sequence[Sample]) -> list[list[float]]:
        """Return the log-probs of the response tokens of each sample that are trained on, nats, on every rank."""
        own: dict[int, list[float]] = {}
        shares = share(samples, [0] * self.ranks.data_size, self._limit)
        batches = self._batches(samples, shares, scored=False)

        def sampled(batch: MicroBatch, hidden: torch.Tensor) -> torch.Tensor:
            here = own_tokens(batch, len(hidden), self.ranks)
            ids, at_responses = here.pick(batch.targets[:, None]), hidden.flatten(0, 1)[here.rows]
            return here.join(token_logprobs(at_responses, self._model.head_weight(), ids, self._vocabulary)[0])

        found = pipeline.run(self._parallel_model, batches, sampled, backward=False)
        for batch, values in zip(batches, found, strict=self.ranks.is_last_pipeline_stage):
            lengths = [samples[i].trained_tokens for i in batch.order]
            for i, part in zip(batch.order, torch.split_with_sizes(values[:, 0], lengths), strict=True):
                own[i] = part.tolist()
        # To the first stage, which has rank 0, and from there to every replica.
        by_stage = parallel.gather_objects(own, self.ranks.pipeline_group)
        by_replica = parallel.gather_objects(by_stage[-1], self.ranks.data_group)
        of_sample = {i: values for part in by_replica for i, values in part.items()}
        return [of_sample.get(i, []) for i in range(len(samples))]

    def hf_tensors(self, *, averaged: bool = False) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield (name, tensor) of the Hugging Face checkpoint, or of the weights' average: whole on rank 0, None on
        others (hugging_face.iterate)."""
        assert self._average is not None or not averaged, "only a teacher of weights ema asks for it"
        values = self._average.values if self._average is not None and averaged else None
        return hugging_face.iterate(self._model, self.shape, self.ranks, values)

    def export_shard(self, *, averaged: bool = False) -> None:
        """Take part in a pass over `hf_tensors` that another rank makes: each tensor is gathered there."""
        for _ in self.hf_tensors(averaged=averaged):
            pass

    def export(self, folder: Path, card: str | None = None) -> None:
        """Write the Hugging Face checkpoint with its card, whole or not at all (hugging_face.export); adapters also
        alone, beside it."""
        if self._lora is not None:
            adapter = folder.with_name("adapter")
            lora.export(self._model, self.shape, self.ranks, self._lora, self.model_path, adapter)
        parts = (self._model, self.shape, self.ranks, self.model_path, folder)
        hugging_face.export(*parts, trust_remote_code=self.spec.trust_remote_code, card=card)

    def save(self, folder: Path) -> None:
        """Write this rank's exact state into an existing folder (state.write), as `snapshot` has it."""
        state.write(folder, self.snapshot(copied=False))

    def begin_save(self, folder: Path) -> None:
        """Copy this rank's exact state to host memory, and begin to write it (CheckpointWriter.begin)."""
        self.writer.check_free()  # before a snapshot takes the memory of the last one
        self.writer.begin(folder, self.snapshot(copied=True))

    def finish_save(self) -> None:
        """Wait until every rank has written what `begin_save` began (CheckpointWriter.finish)."""
        self.writer.finish()

    def snapshot(self, *, copied: bool) -> state.Snapshot:
        """This rank's exact state (state.snapshot) after the last step; gradients of the next are no part of it."""
        copies = self._copies if copied else None
        parts = (self.ranks, self.shape, self._model, self._optimizer)
        return state.snapshot(*parts, copied=copied, copies=copies, average=self._average)

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote, with the same split over ranks to the last bit (state.load)."""
        state.load(folder, self.ranks, self.shape, self._model, self._optimizer, self._average)
        self._begin_step()

    def _begin_step(self) -> None:
        self._parallel_model.zero_grad_buffer()
        self._optimizer.zero_grad()
        self._sums = no_sums(self.ranks.device)
        self._positions = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        self._loads = [0] * self.ranks.data_size
        self._samples = self._tokens = self._local_tokens = self._used = 0
        self._coefficients = self._first_coefficients

    def _batches(
        self, samples: Sequence[Sample], shares: Sequence[Sequence[int]], *, scored: bool = True
    ) -> list[MicroBatch]:
        """Return this rank's micro-batches. With expert parallelism as many as every rank has: in each layer of each of
        them their tokens meet."""
        meet = self.ranks.expert_size > 1
        most = max(len(split(samples, indices, self._limit)) for indices in shares) if meet else 0
        own, device = shares[self.ranks.data_rank], self.ranks.device
        return list(micro_batches(samples, own, self._limit, device, scored=scored, at_least=most))

    def _gradient_is_finite(self) -> bool:
        """Return, on every rank alike, whether the gradient is finite."""
        buffers = [*self._parallel_model.buffers, *self._parallel_model.expert_parallel_buffers]
        finite = memory.all_finite([buffer.grad_data for buffer in buffers], self.ranks.device).to(torch.int)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)


def _optimizer_config(spec: Spec, dtype: torch.dtype) -> OptimizerConfig:
    optimizer = spec.trainer.optimizer
    return OptimizerConfig(
        optimizer="adam",
        lr=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.epsilon,
        clip_grad=optimizer.clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=optimizer.distributed,
    )
