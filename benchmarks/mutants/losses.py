"""Mutants of the losses: formulas, rows and masks, features, modules."""

from __future__ import annotations

from .mutant import Mutant, mutant

ROWS = "tests/losses/test_golden.py tests/losses/test_weighted_sum.py tests/losses/test_modules.py"
MASKS = "tests/losses/test_golden.py tests/losses/test_battery.py"
FEATURES = "tests/losses/test_features.py"
MAPS = "tests/losses/test_maps.py tests/losses/test_features.py"
EMBEDDINGS = "tests/losses/test_embeddings.py tests/losses/test_features.py"
LABELS = "tests/losses/test_impossible_classes.py tests/losses/test_battery.py"
REWEIGHTED = "tests/losses/test_golden.py tests/losses/test_reweighted.py"
PAIRWISE = "tests/losses/test_golden.py tests/losses/test_pairwise.py"

LOSSES: tuple[Mutant, ...] = (
    # Rows, masks, weights, reductions
    mutant(
        "losses/mean counts the first dimension only",
        MASKS,
        "factor /= max(rows.numel(), 1)",
        "factor /= max(rows[0], 1)",
    ),
    mutant(
        "losses/mean divides by the rows, not by their weights",
        MASKS,
        "return self.weight * (factor / torch.where(total == 0, 1, total))",
        "return self.weight * (factor / max(self.weight.numel(), 1))",
    ),
    mutant(
        "losses/no factor for a weighted sum",
        MASKS,
        "return self.weight if factor == 1 else self.weight * factor",
        "return self.weight",
    ),
    mutant(
        "losses/ignored rows count",
        MASKS,
        "weight = weight.masked_fill(idle, 0)",
        "weight = weight.masked_fill(idle, 1)",
    ),
    mutant(
        "losses/rows without a label count where one is needed",
        MASKS,
        "idle |= target == unlabelled_index",
        "idle &= target == unlabelled_index",
    ),
    mutant(
        "losses/weights reach neither value nor sum",
        MASKS,
        "values = torch.where(self.weight == 0, 0, self.weight * values)",
        "values = torch.where(self.weight == 0, 0, values)",
    ),
    mutant(
        "losses/empty selection divides by 0",
        MASKS,
        "return total / torch.where(weight == 0, 1, weight)",
        "return total / weight",
    ),
    mutant(
        "losses/NaN of a teacher's idle row is not masked",
        MASKS,
        "student, teacher = student.masked_fill(idle, 0), teacher.masked_fill(idle, 0)",
        "student = student.masked_fill(idle, 0)",
    ),
    mutant(
        "losses/a label that one network excludes is refused",
        LABELS,
        "wrong | (excluded[0] & excluded[1] &",
        "wrong | ((excluded[0] | excluded[1]) &",
    ),
    mutant(
        "losses/a label of class C passes",
        f"{LABELS} tests/losses/test_errors.py",
        "wrong = (self.target < UNLABELLED) | (self.target >= classes)",
        "wrong = (self.target < UNLABELLED) | (self.target > classes)",
    ),
    mutant(
        "losses/a class exists only in both networks",
        LABELS,
        "return (self.student != -torch.inf) | (self.teacher != -torch.inf)",
        "return (self.student != -torch.inf) & (self.teacher != -torch.inf)",
    ),
    mutant(
        "losses/teacher receives a gradient",
        "tests/losses/test_teacher_gradient.py tests/losses/test_battery.py",
        "return logits if is_wanted() else logits.detach()",
        "return logits",
    ),
    mutant(
        "losses/learnt row weights skip no row",
        "tests/losses/test_battery.py tests/losses/test_curriculum.py tests/losses/test_laws.py",
        "values = share * rows((share != 0).to(share.dtype))",
        "values = share * rows(None)",
    ),
    # Formulas on logits
    mutant(
        "losses/no T^2",
        ROWS,
        "        factor = temperature**2 if scale_by_temperature else 1.0",
        "        factor = temperature if scale_by_temperature else 1.0",
    ),
    mutant(
        "losses/infinite temperature without JSD's share",
        f"{ROWS} tests/losses/test_limits.py",
        "divergence, factor = kl_limit, share_of_limit",
        "divergence = kl_limit",
    ),
    mutant(
        "losses/DKD without T^2",
        ROWS,
        "return blocks.reduce(rows, reduction, factor=temperature**2 if scale_by_temperature else 1.0)",
        "return blocks.reduce(rows, reduction)",
    ),
    mutant(
        "losses/P-ListMLE weights without -1",
        ROWS,
        "weights = places * (torch.exp2(length - k) - 1)",
        "weights = places * torch.exp2(length - k)",
    ),
    mutant(
        "losses/ListMLE ranks a NaN teacher",
        f"{ROWS} tests/losses/test_laws.py",
        "places.masked_fill(unknown[:, None], torch.nan)",
        "places",
    ),
    mutant(
        "losses/WSLD weight passes a gradient",
        REWEIGHTED,
        "for logits in (rows.student.detach(), rows.teacher)",
        "for logits in (rows.student, rows.teacher)",
    ),
    mutant(
        "losses/NKD without T^2",
        REWEIGHTED,
        "gamma * temperature**2 * _cross_entropy(",
        "gamma * _cross_entropy(",
    ),
    mutant(
        "losses/TVD without a half",
        REWEIGHTED,
        "0.5 * (p - q).abs().sum(-1)",
        "(p - q).abs().sum(-1)",
    ),
    mutant(
        "losses/Tf-KD counts the label among the others",
        REWEIGHTED,
        "others = (rows.present() & ~is_target).sum(",
        "others = rows.present().sum(",
    ),
    mutant(
        "losses/hinge with the wrong sign",
        PAIRWISE,
        "(margin - lead).clamp(min=0)",
        "(margin + lead).clamp(min=0)",
    ),
    mutant(
        "losses/equal classes of the teacher are compared",
        PAIRWISE,
        "counts = (differences(t, first, count) > 0) &",
        "counts = (differences(t, first, count) >= 0) &",
    ),
    mutant(
        "losses/ranking logistic without steepness",
        PAIRWISE,
        "-F.logsigmoid(steepness * lead)",
        "-F.logsigmoid(lead)",
    ),
    mutant(
        "losses/DIST counts classes that do not exist",
        f"{ROWS} tests/losses/test_impossible_classes.py",
        "/ exists.sum().clamp(min=1)",
        "/ exists.numel()",
    ),
    mutant(
        "losses/suggested temperature searches the wrong half",
        "tests/losses/test_temperature.py",
        "if _first_place(rows, math.exp(middle)) > first_place:",
        "if _first_place(rows, math.exp(middle)) < first_place:",
    ),
    # Features
    mutant(
        "losses/teacher's features receive a gradient",
        FEATURES,
        "return student.to(dtype), teacher.detach().to(dtype)",
        "return student.to(dtype), teacher.to(dtype)",
    ),
    mutant(
        "losses/maps grow to the larger size",
        MAPS,
        "size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])",
        "size = max(a.shape[2], b.shape[2]), max(a.shape[3], b.shape[3])",
    ),
    mutant(
        "losses/products under autocast",
        FEATURES,
        "return torch.autocast(x.device.type, enabled=False)",
        "return torch.autocast(x.device.type, enabled=True)",
    ),
    mutant(
        "losses/NST without the factor 2",
        MAPS,
        "return tt + ss - 2 * st",
        "return tt + ss - st",
    ),
    mutant(
        "losses/CWD over channels instead of places",
        MAPS,
        "t.flatten(2), temperature=temperature, class_dim=-1)",
        "t.flatten(2), temperature=temperature, class_dim=1)",
    ),
    mutant(
        "losses/VID with a standard deviation",
        MAPS,
        "/ variance + variance.log()).mean()",
        "/ variance + variance.sqrt().log()).mean()",
    ),
    mutant(
        "losses/OFD skips what the teacher activates",
        MAPS,
        "counts = (s > t) | (t > 0)",
        "counts = s > t",
    ),
    mutant(
        "losses/MGD masks what it should keep",
        MAPS,
        "device=s.device) >= mask_ratio",
        "device=s.device) < mask_ratio",
    ),
    mutant(
        "losses/PKT with networks exchanged",
        EMBEDDINGS,
        "(p_t * ((p_t + eps) / (p_s + eps)).log()).mean()",
        "(p_s * ((p_s + eps) / (p_t + eps)).log()).mean()",
    ),
    mutant(
        "losses/CC without the factorial",
        EMBEDDINGS,
        "2 * gamma - math.lgamma(p + 1)",
        "2 * gamma",
    ),
    mutant(
        "losses/RKD angles over pairs",
        EMBEDDINGS,
        "return _sum_of_angles(s, t, 0, rows) / rows**3",
        "return _sum_of_angles(s, t, 0, rows) / rows**2",
    ),
    mutant(
        "losses/RKD parts of the angles over pairs",
        EMBEDDINGS,
        "return torch.stack(parts).sum() / rows**3",
        "return torch.stack(parts).sum() / rows**2",
    ),
    mutant(
        "losses/exploration pulls",
        "tests/losses/test_iekd.py",
        "return -inheritance_loss(student_features, teacher_features)",
        "return inheritance_loss(student_features, teacher_features)",
    ),
    # Modules
    mutant(
        "losses/CRD draws negatives of the own class",
        "tests/losses/test_crd.py",
        "torch.where(other < first, other, other + count)",
        "torch.where(other <= first, other, other + count)",
    ),
    mutant(
        "losses/CRD bank moves by the wrong share",
        "tests/losses/test_crd.py",
        "self.momentum * bank[places] + (1 - self.momentum) * mean",
        "(1 - self.momentum) * bank[places] + self.momentum * mean",
    ),
    mutant(
        "losses/CRD odds with the wrong prior",
        "tests/losses/test_crd.py",
        "log_z - math.log(self.drawn / self.rows)",
        "log_z + math.log(self.drawn / self.rows)",
    ),
    mutant(
        "losses/warm-up starts at 0",
        "tests/losses/test_weighted_sum.py",
        "min(epoch / warmup, 1.0) * weight",
        "min((epoch - 1) / warmup, 1.0) * weight",
    ),
    mutant(
        "losses/a term without weight counts NaN",
        "tests/losses/test_weighted_sum.py",
        "(student_logits, teacher_logits, target) if weight else",
        "(student_logits, teacher_logits, target) if weight is not None else",
    ),
)
