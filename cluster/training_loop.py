"""The loop every training worker runs, alone in a process or as one rank of many: the same steps in either case."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from cluster.checkpoints import Checkpoint, newest_epoch, read_checkpoint, to_bytes, write_checkpoint
from cluster.runtime import peak_rss_bytes
from cluster.trainee import TrainContext, TrainJob, TrainResult
from cluster.training_device import (
    choose_precision,
    from_rank_0,
    gather,
    mean_over_ranks,
    place_model,
    to_device,
    wrap_model,
)
from cluster.training_input import Batch, BatchReader, stream_batches, validation_batches
from cluster.training_rows import Rows, open_rows
from subcat_core.schedule import build_sgd, set_poly_lr

_WINDOW_STEPS = 10  # losses stay on the device for so many steps: fetching one waits for all work before it


def run_worker(job: TrainJob, context: TrainContext) -> None:
    """Train from the newest checkpoint to the last epoch; rank 0 writes checkpoints, model.pt and result.json.

    Raises ValueError where the loss is not finite, too many images are bad, or a checkpoint is of another training.
    """
    if context.num_threads:
        torch.set_num_threads(context.num_threads)
    with open_rows(job.rows) as rows, open_rows(job.val_rows) as val_rows:
        assert rows is not None
        _run(_Worker(job, context, rows, val_rows))


def _run(worker: _Worker) -> None:
    job, context, length = worker.job, worker.context, worker.job.length
    epochs = range(worker.epoch + 1, length.num_epochs + 1)
    num_done = length.steps_until(worker.epoch)
    keys = itertools.islice(job.plan.batches(context.rank, context.world_size, epochs), length.num_steps - num_done)
    context.post("progress", num_done, {})
    stream = stream_batches(worker.reader, worker.rows, keys, job.compute)
    with contextlib.closing(stream):  # type: ignore[type-var]
        for epoch in epochs:
            record = worker.train_epoch(epoch, stream)
            worker.keep(epoch, record, worker.validate() if job.validates_after(epoch) else {})
    worker.finish()


class _Worker:
    """Model, optimiser and record of one rank; epoch: the last one done."""

    def __init__(self, job: TrainJob, context: TrainContext, rows: Rows, val_rows: Rows | None) -> None:
        self.job, self.context = job, context
        self.rows, self.val_rows = rows, val_rows
        self.reader = BatchReader(job.trainee, job.rng_seed)
        torch.manual_seed(job.rng_seed)
        self.bare = place_model(job.trainee.build_model(), job.optimiser, context)
        settings = job.optimiser
        self.sgd = build_sgd(
            job.trainee.parameter_groups(self.bare),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.dtype = from_rank_0(choose_precision(settings.precision, context.device, self.bare), context)
        self.history: list[dict[str, float]] = []
        self.bad_rows: dict[str, dict[str, str]] = {}
        self.epoch = from_rank_0(newest_epoch(job.folder) if context.rank == 0 else 0, context)
        if self.epoch:
            self._load()
        self.model = wrap_model(self.bare, context)

    def _load(self) -> None:
        folder = self.job.folder
        checkpoint = read_checkpoint(folder, self.epoch, self.job.identity())
        try:
            self.bare.load_state_dict(checkpoint.model)
            self.sgd.load_state_dict(checkpoint.optimiser)
        except (RuntimeError, ValueError, KeyError) as error:
            where = folder.uri("checkpoints")
            raise ValueError(f"{where}: of another model ({error}); delete the folder to train again") from error
        self.history, self.bad_rows = checkpoint.history, checkpoint.bad_rows

    def train_epoch(self, epoch: int, stream: Iterator[Batch]) -> dict[str, float]:
        """One epoch; its record. The random state depends on (rng_seed, epoch, rank) alone, so resuming repeats it."""
        job = self.job
        started = time.monotonic()
        torch.manual_seed(_mix(job.rng_seed, epoch, self.context.rank))
        self.model.train()
        steps = job.length.steps_of(epoch)
        window = _Window(job, self.context)
        for step in steps:
            batch = next(stream)
            self._count_bad(batch, self.rows)
            window.add(step, *self._step(step, batch))
        window.flush()
        self._share_bad()
        seconds = time.monotonic() - started
        rate = len(steps) * job.optimiser.batch_size / seconds
        means = {name: total / len(steps) for name, total in window.totals.items()}
        return {"epoch": epoch, "step": steps.stop, **means, "seconds": seconds, "images_per_s": rate}

    def _step(self, step: int, batch: Batch) -> tuple[dict[str, torch.Tensor], float]:
        settings = self.job.optimiser
        rate = set_poly_lr(
            self.sgd,
            lr=settings.learning_rate,
            step=step,
            total_steps=self.job.length.total_steps,
            power=settings.poly_power,
            refresh_every=settings.refresh_lr_every,
            warmup_steps=settings.warmup_steps,
        )
        with self._autocast():
            loss, scalars = self.job.trainee.loss(self.model, self._tensors(batch))
        self.sgd.zero_grad(set_to_none=True)
        loss.backward()
        self.sgd.step()
        return {"loss": loss, **scalars}, rate

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The trainee's metrics over all readable validation rows; the same on every rank, for any number of ranks."""
        job, context = self.job, self.context
        table = self.val_rows
        assert table is not None
        local = job.optimiser.batch_size // context.world_size
        keys = validation_batches(table.num_rows, local, context.rank, context.world_size)
        rows, parts = [np.zeros(0, np.int64)], []
        self.bare.eval()
        if context.world_size > 1:  # on CPUs, each rank's batch norm has seen its own images in the last step
            for buffer in self.bare.buffers():
                dist.broadcast(buffer, src=0)
        stream = stream_batches(self.reader, table, keys, job.compute)
        with contextlib.closing(stream):  # type: ignore[type-var]
            for batch in stream:
                self._count_bad(batch, table)
                good = np.flatnonzero(batch.arrays["weight"])
                with self._autocast():
                    outputs = job.trainee.outputs(self.bare, self._tensors(batch))
                rows.append(batch.rows[good])
                parts.append({name: value.cpu().numpy()[good] for name, value in outputs.items()})
        self._share_bad()
        gathered = gather((np.concatenate(rows), parts), context)
        order = np.argsort(np.concatenate([rank_rows for rank_rows, _ in gathered]))
        all_parts = [part for _, rank_parts in gathered for part in rank_parts]
        if not len(order):
            return {}
        return job.trainee.metrics({k: np.concatenate([p[k] for p in all_parts])[order] for k in all_parts[0]})

    def keep(self, epoch: int, record: dict[str, float], validation: dict[str, float]) -> None:
        """Rank 0 writes the checkpoint and tells the driver; the others wait at the next step anyway."""
        self.epoch = epoch
        self.history.append({**record, **validation})
        if self.context.rank:
            return
        state = self.bare.state_dict(), self.sgd.state_dict()
        checkpoint = Checkpoint(epoch, *state, self.history, self.bad_rows, self.job.identity())
        write_checkpoint(self.job.folder, checkpoint, self.job.optimiser.keep_checkpoints)
        trained = {f"epoch_{name}": value for name, value in record.items() if name not in ("epoch", "step")}
        self.context.post("metrics", int(record["step"]), {"epoch": epoch, **trained, **validation})

    def finish(self) -> None:
        """Rank 0 writes the model, a plain state dict, and then the result: who finds the result finds the model."""
        peak = max(gather(peak_rss_bytes(), self.context))
        if self.context.rank:
            return
        folder = self.job.folder
        model = {name: tensor.detach().cpu().contiguous() for name, tensor in self.bare.state_dict().items()}
        folder.write_bytes("model.pt", to_bytes(model))
        result = dataclasses.asdict(self._result(peak))
        result["weights"] = getattr(self.bare, "weights_account", "")  # what the start of the training was loaded from
        result |= {"identity": self.job.identity(), "precision": "bf16" if self.dtype == torch.bfloat16 else "fp32"}
        folder.write_json("result.json", result)
        self.context.post("progress", self.job.length.num_steps, {})

    def _result(self, peak: int) -> TrainResult:
        timing = ("epoch", "step", "learning_rate", "seconds", "images_per_s")
        validated = [record for record in self.history if self.job.validates_after(int(record["epoch"]))]
        last = {**(validated[-1] if validated else {}), **self.history[-1]}
        num_images = self.job.length.num_steps * self.job.optimiser.batch_size
        seconds = sum(record["seconds"] for record in self.history)
        return TrainResult(
            history=self.history,
            metrics={name: value for name, value in last.items() if name not in timing},
            num_images=num_images,
            num_bad=len(self.bad_rows),
            bad_rows=list(self.bad_rows.values()),
            seconds=seconds,
            images_per_s=num_images / seconds,
            peak_rss_bytes=peak,
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.context.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _tensors(self, batch: Batch) -> dict[str, torch.Tensor]:
        return to_device(batch.arrays, self.context.device, self.job.optimiser.channels_last)

    def _count_bad(self, batch: Batch, table: Rows) -> None:
        for row, reason in zip(batch.rows, batch.reasons, strict=True):
            if reason:
                (found,) = table.take(np.array([row])).select(["image_id", "uri"]).to_pylist()
                named = {name: str(value) for name, value in found.items()}
                self.bad_rows.setdefault(named["image_id"], {**named, "reason": reason})
        self._check_bad()

    def _share_bad(self) -> None:
        for others in gather(self.bad_rows, self.context):
            for image_id, bad in others.items():
                self.bad_rows.setdefault(image_id, bad)
        self.bad_rows = dict(sorted(self.bad_rows.items()))
        self._check_bad()

    def _check_bad(self) -> None:
        num_rows = self.job.rows.num_rows + (self.job.val_rows.num_rows if self.job.val_rows is not None else 0)
        if len(self.bad_rows) > self.job.max_bad_frac * num_rows:
            first = "; ".join(f"{bad['uri']}: {bad['reason']}" for bad in list(self.bad_rows.values())[:3])
            raise ValueError(
                f"{len(self.bad_rows)} bad images among {num_rows}, the limit is {self.job.max_bad_frac:.1%} "
                f"({first}); repair or remove them (`subcat validate` lists all), or raise max_bad_frac"
            )


class _Window:
    """Scalars of the last steps, kept on the device and fetched together; totals: their sums so far."""

    def __init__(self, job: TrainJob, context: TrainContext) -> None:
        self._job, self._context = job, context
        self._steps: list[dict[str, torch.Tensor]] = []
        self._started = time.monotonic()
        self._last_step, self._rate = 0, 0.0
        self.totals: dict[str, float] = {}

    def add(self, step: int, scalars: dict[str, torch.Tensor], learning_rate: float) -> None:
        """step: counted from 0."""
        self._steps.append({name: value.detach().float() for name, value in scalars.items()})
        self._last_step, self._rate = step, learning_rate
        if len(self._steps) == _WINDOW_STEPS:
            self.flush()

    def flush(self) -> None:
        """Fetch, check and report. Every rank sees the mean over the ranks, so all of them stop at the same NaN."""
        if not self._steps:
            return
        names, count = list(self._steps[0]), len(self._steps)
        stacked = torch.stack([torch.stack([scalars[name] for name in names]) for scalars in self._steps])
        values = mean_over_ranks(stacked, self._context).cpu().double().numpy()
        num_steps = self._job.length.num_steps
        for offset, loss in enumerate(values[:, names.index("loss")]):
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} at step {self._last_step - count + 1 + offset} of {num_steps} "
                    f"(learning rate {self._rate:.3g}); lower optimiser.learning_rate"
                )
        for name, total in zip(names, values.sum(axis=0), strict=True):
            self.totals[name] = self.totals.get(name, 0.0) + float(total)
        self.totals["learning_rate"] = self.totals.get("learning_rate", 0.0) + count * self._rate
        seconds = time.monotonic() - self._started
        told = dict(zip(names, map(float, values.mean(axis=0)), strict=True))
        told |= {"learning_rate": self._rate, "images_per_s": count * self._job.optimiser.batch_size / seconds}
        self._context.post("metrics", self._last_step + 1, told)
        self._steps, self._started = [], time.monotonic()


def _mix(*numbers: int) -> int:
    """A torch seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
