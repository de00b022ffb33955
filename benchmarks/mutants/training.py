"""Mutants of training, checkpoints, metrics and data."""

from __future__ import annotations

from .mutant import Mutant, mutant

ENGINE = "tests/training/test_engine.py"
RESUME = "tests/training/test_checkpoint.py tests/runs/test_resume.py tests/training/test_engine.py"
METRICS = "tests/training/test_metrics.py"
EXAMPLES = "tests/data/test_examples.py"
BATCHES = "tests/data/test_batches.py"
DATASET = "tests/data/test_dataset.py"

TRAINING: tuple[Mutant, ...] = (
    # The loop
    mutant(
        "training/accumulated gradients keep their sum's scale",
        ENGINE,
        "self.scale_gradients(accelerator.gradient_accumulation_steps / gathered)",
        "self.scale_gradients(1.0)",
        "self.scale_gradients(accelerator.gradient_accumulation_steps / accumulated)",
        "self.scale_gradients(1.0)",
    ),
    mutant(
        "training/gradients are clipped at twice the norm",
        ENGINE,
        "accelerator.clip_grad_norm_(self.parameters, self.clip_norm)",
        "accelerator.clip_grad_norm_(self.parameters, 2 * self.clip_norm)",
    ),
    mutant(
        "training/student trains in evaluation mode",
        ENGINE,
        "self.student.train()\n        rest(self.resting)",
        "self.student.eval()\n        rest(self.resting)",
    ),
    mutant(
        "training/every epoch sees the rows in one order",
        f"{ENGINE} tests/runs/test_resume.py",
        "self.batches.set_epoch(number)",
        "self.batches.set_epoch(0)",
    ),
    mutant(
        "training/a NaN loss is trained on",
        ENGINE,
        'if self.accelerator.device.type == "cpu" or self.step % FINITE_CHECK_STEPS == 0:',
        "if self.step % FINITE_CHECK_STEPS == 1:",
    ),
    mutant(
        "training/the average of weights never moves",
        ENGINE,
        "self.average.update_parameters(self.bare)",
        "pass",
        "self.average.update_parameters(self.unwrapped_student)",
        "pass",
    ),
    mutant(
        "training/a short batch weighs as much as a full one",
        ENGINE,
        'accelerator.backward(len(batch["target"]) / self.batch_size * terms["loss"])',
        'accelerator.backward(terms["loss"])',
    ),
    mutant(
        "training/warm-up starts at rate 0",
        ENGINE,
        "return (step + 1) / warmup",
        "return step / warmup",
    ),
    mutant(
        "training/cosine rises",
        ENGINE,
        "return 0.5 * (1 + math.cos(",
        "return 0.5 * (1 - math.cos(",
    ),
    mutant(
        "training/milestones a step late",
        ENGINE,
        "sum(step >= epoch * steps_per_epoch for epoch in options.milestones)",
        "sum(step > epoch * steps_per_epoch for epoch in options.milestones)",
    ),
    mutant(
        "training/the later of equal epochs is best",
        ENGINE,
        "if (accuracy, -loss) <= (self.best_accuracy, -self.best_loss):",
        "if (accuracy, -loss) < (self.best_accuracy, -self.best_loss):",
    ),
    mutant(
        "training/patience is an epoch too long",
        ENGINE,
        "self.epoch - self.best_epoch >= patience",
        "self.epoch - self.best_epoch > patience",
    ),
    # Resuming
    mutant(
        "training/the last epoch is not saved",
        RESUME,
        "due = best.epoch % options.checkpoint_every == 0 or best.epoch == options.epochs",
        "due = best.epoch % options.checkpoint_every == 0",
    ),
    mutant(
        "training/the schedule starts again",
        RESUME,
        "schedule.last_epoch = self.step",
        "schedule.last_epoch = 0",
    ),
    mutant(
        "training/the method's parameters are not restored",
        f"{RESUME} tests/runs/test_features.py",
        'self.method.load_state_dict(state["method"])',
        "pass",
    ),
    mutant(
        "training/the method's optimizers are not restored",
        f"{RESUME} tests/runs/test_mutual.py",
        'own.load_state_dict(state["optimizers"][name])',
        "pass",
        'optimizer.load_state_dict(state["optimizers"][name])',
        "pass",
    ),
    mutant(
        "training/the average of weights is not restored",
        RESUME,
        'self.average.load_state_dict(state["average"])',
        "pass",
    ),
    mutant(
        "training/the best weights are not saved",
        RESUME,
        '"best_weights": best_weights,',
        '"best_weights": {},',
        '"best_weights": self.best_weights,',
        '"best_weights": {},',
    ),
    mutant(
        "training/evaluation draws from the global generator",
        f"{BATCHES} {RESUME}",
        "generator=torch.Generator() if seed is None else None",
        "generator=None",
    ),
    # Checkpoints
    mutant(
        "checkpoint/epoch 9 is later than epoch 10",
        RESUME,
        "    return sorted(epochs, key=epochs.__getitem__)",
        "    return sorted(epochs)",
    ),
    mutant(
        "checkpoint/older ones stay",
        RESUME,
        "            for path in older:\n                shutil.rmtree(path)",
        "            assert older is not None",
    ),
    mutant(
        "checkpoint/prefixes of other tools stay",
        "tests/training/test_weights.py",
        "plain = {name.removeprefix(prefix): value for",
        "plain = {name: value for",
    ),
    mutant(
        "checkpoint/a half-written checkpoint stays",
        RESUME,
        "files.FAILURES, UserError) as error:\n        shutil.rmtree(aside, ignore_errors=True)\n",
        "files.FAILURES, UserError) as error:\n",
    ),
    # Metrics
    mutant(
        "metrics/student evaluated in training mode",
        f"{METRICS} tests/training/test_engine.py",
        "    student.eval()\n    rows: list[tuple[Tensor, ...]] = []",
        "    student.train()\n    rows: list[tuple[Tensor, ...]] = []",
    ),
    mutant(
        "metrics/KL the other way round",
        METRICS,
        'result["kl"] = kd_loss(student_logits, teacher_logits).item()',
        'result["kl"] = kd_loss(teacher_logits, student_logits).item()',
    ),
    mutant(
        "metrics/bottom includes all but the top",
        METRICS,
        '("bottom", order[:, -size:])',
        '("bottom", order[:, size:])',
    ),
    mutant(
        "metrics/overlap over all classes",
        METRICS,
        "((chosen[0] * chosen[1]).sum(-1) / topk).mean()",
        "((chosen[0] * chosen[1]).sum(-1) / classes).mean()",
        "((first[0] * first[1]).sum(-1) / topk).mean()",
        "((first[0] * first[1]).sum(-1) / classes).mean()",
    ),
    mutant(
        "metrics/bins are rounded",
        METRICS,
        "bins = (confidence * BINS).long().clamp(max=BINS - 1)",
        "bins = (confidence * BINS).round().long().clamp(max=BINS - 1)",
    ),
    # Data
    mutant(
        "data/held-out rows are transformed",
        f"{EXAMPLES} tests/data/test_folders.py",
        "examples._at(held).plain",
        "examples._at(held)",
    ),
    mutant(
        "data/validation rows are transformed",
        f"{EXAMPLES} tests/data/test_folders.py",
        "Examples(source, held_out).plain,",
        "Examples(source, held_out),",
    ),
    mutant(
        "data/runs share their orders",
        f"{BATCHES} {EXAMPLES}",
        "np.random.default_rng([self.seed, self.epoch])",
        "np.random.default_rng(self.seed + self.epoch)",
    ),
    mutant(
        "data/split is not stratified",
        f"{DATASET} {EXAMPLES}",
        "stratify=labels.numpy(), random_state=seed",
        "random_state=seed",
    ),
    mutant(
        "data/sample deviation instead of the population's",
        f"{DATASET} tests/data/test_sources.py tests/data/test_loaders.py",
        "std = (squares / count).sqrt()",
        "std = (squares / (count - 1)).sqrt()",
    ),
    mutant(
        "data/one label too many per class",
        EXAMPLES,
        "random.permutation(len(rows))[:per_class]",
        "random.permutation(len(rows))[: per_class + 1]",
    ),
    mutant(
        "data/rows are not repeated evenly",
        EXAMPLES,
        "torch.arange(size) % len(self)",
        "torch.arange(size).clamp(max=len(self) - 1)",
    ),
    mutant(
        "data/the second view repeats the first draw",
        BATCHES,
        'batch["strong"] = strong_augment(augment(plain))',
        'batch["strong"] = strong_augment(batch["input"])',
    ),
)
