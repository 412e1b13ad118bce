"""The official code's own numbers: losses, gradients, trainings, CutMix, labels, rates, crops.

golden/official_mealv2.npz holds what the modules of the MEAL V2 and FKD repositories computed on a
CPU, case by case; every case is tested here, through the classes that a run uses.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import linear_layers
from mealv2.cutmix import Mix, cutmix_box
from mealv2.data.pixels import cut
from mealv2.errors import LabelSetError
from mealv2.fkd import labels_of
from mealv2.losses import discriminator_loss, similarity_loss
from mealv2.models.discriminator import REDUCTION, Discriminator
from mealv2.models.ensemble import TeacherEnsemble, combine
from mealv2.soft_labels import top_k
from mealv2.targets import BatchTargets, OnlineTeachers
from mealv2.task import DistillTask, HardLabelTask, Mixture
from mealv2.views import View
from official import GOLDEN
from pipeline.config import FinetuneConfig
from pipeline.training.optimizer import Schedule

CASES = ["A", "B", "B1", "X"]
TOLERANCE = {"rtol": 1e-3, "atol": 1e-6}  # float32 with another BLAS


def tensor(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def close(actual: Tensor | float, expected: np.ndarray) -> None:
    value = actual.detach().numpy() if isinstance(actual, Tensor) else actual
    np.testing.assert_allclose(value, expected, **TOLERANCE)


def official_discriminator(prefix: str) -> Discriminator:
    """Return our discriminator with the weights of the official one's three convolutions."""
    discriminator = Discriminator(GOLDEN[f"{prefix}1_w"].shape[1], "official")
    with torch.no_grad():
        for number, layer in enumerate(linear_layers(discriminator), start=1):
            layer.weight.copy_(tensor(f"{prefix}{number}_w"))
            layer.bias.copy_(tensor(f"{prefix}{number}_b"))
    return discriminator


# --- A, B, B1, X: one batch ---------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_ensemble_is_the_official_mean_of_probabilities_and_mean_of_logits(case: str) -> None:
    batch_targets = combine(tensor(f"{case}_teacher_logits"))
    close(batch_targets.probs_BC, GOLDEN[f"{case}_soft_labels"])
    close(batch_targets.mean_logits_BC, GOLDEN[f"{case}_mean_logits"])
    classes, reduction, size, num_teachers, _ = GOLDEN[f"{case}_meta_C_K_N_T_dseed"].tolist()
    assert GOLDEN[f"{case}_teacher_logits"].shape == (num_teachers, size, classes)
    assert reduction == REDUCTION


@pytest.mark.parametrize("case", CASES)
def test_both_losses_and_the_students_gradients_are_the_official_codes(case: str) -> None:
    student = tensor(f"{case}_student_logits").requires_grad_()
    batch_targets = combine(tensor(f"{case}_teacher_logits"))
    discriminator = official_discriminator(f"{case}_D_conv")
    close(torch.log_softmax(student, 1), GOLDEN[f"{case}_student_log_probs"])

    similarity = similarity_loss(student, batch_targets.probs_BC)
    adversary, _ = discriminator_loss(discriminator, student, batch_targets.mean_logits_BC)
    close(similarity, GOLDEN[f"{case}_g_loss"])
    close(adversary, GOLDEN[f"{case}_d_loss"])
    close(similarity + adversary, GOLDEN[f"{case}_total_loss"])
    for loss, name in ((similarity, "from_g"), (adversary, "from_d")):
        close(
            torch.autograd.grad(loss, student, retain_graph=True)[0],
            GOLDEN[f"{case}_grad_student_{name}"],
        )
    (total,) = torch.autograd.grad(similarity + adversary, student)
    close(total, GOLDEN[f"{case}_grad_student_total"])


@pytest.mark.parametrize("case", CASES)
def test_every_layers_gradient_and_every_output_are_the_official_codes(case: str) -> None:
    student, teacher = tensor(f"{case}_student_logits"), tensor(f"{case}_mean_logits")
    discriminator = official_discriminator(f"{case}_D_conv")
    rows = torch.cat([student, teacher])
    close(discriminator.layers[:-1](rows), GOLDEN[f"{case}_d_pre_relu3"])
    close(discriminator(rows), GOLDEN[f"{case}_d_out"])
    target = GOLDEN[f"{case}_d_target"]
    assert target[: len(student)].tolist() == [[1.0, 0.0]] * len(student)
    assert target[len(student) :].tolist() == [[0.0, 1.0]] * len(student)
    loss, _ = discriminator_loss(discriminator, student, teacher)
    loss.backward()
    for number, layer in enumerate(linear_layers(discriminator), start=1):
        close(layer.weight.grad, GOLDEN[f"{case}_gradD_conv{number}_w"])
        close(layer.bias.grad, GOLDEN[f"{case}_gradD_conv{number}_b"])


@pytest.mark.parametrize("case", CASES)
def test_hard_label_loss_is_the_official_codes_in_evaluation(case: str) -> None:
    batch_targets = BatchTargets(classes_B=tensor(f"{case}_labels_int"))
    result = HardLabelTask(nn.Identity())(tensor(f"{case}_student_logits"), batch_targets)
    close(result["loss"], GOLDEN[f"{case}_eval_ce"])


def test_a_dead_official_discriminator_gives_ln_2_and_no_gradient() -> None:
    discriminator = official_discriminator("X_D_conv")
    student = tensor("X_student_logits").requires_grad_()
    loss, accuracy = discriminator_loss(discriminator, student, tensor("X_mean_logits"))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(np.log(2), rel=1e-6)
    assert float(accuracy) == 0.5
    gradients = [student.grad, *(p.grad for p in discriminator.parameters())]
    assert all(int(gradient.count_nonzero()) == 0 for gradient in gradients)


# --- E, EC, F, FC: four steps of training -------------------------------------------------------


def linear(name: str, suffix: str = "") -> nn.Linear:
    layer = nn.Linear(12, 1000)
    with torch.no_grad():
        layer.weight.copy_(tensor(f"E_{name}_w{suffix}"))
        layer.bias.copy_(tensor(f"E_{name}_b{suffix}"))
    return layer


def network(layer: nn.Linear, *, pooled: bool) -> nn.Sequential:
    """Images of 2 x 2, or 8 x 8 pooled to them, then the linear layer."""
    return nn.Sequential(nn.AvgPool2d(4) if pooled else nn.Identity(), nn.Flatten(), layer)


class Training:
    """A student, the official discriminator and one joint SGD, from E's initial weights."""

    def __init__(self, *, pooled: bool, shown: str | None = None) -> None:
        self.student = linear("student", "_init")
        self.discriminator = official_discriminator("E_D_init_conv")
        self.task = DistillTask(
            network(self.student, pooled=pooled),
            self.discriminator,
            discriminator_input=shown,  # type: ignore[arg-type]
        )
        # the rate in force for both groups, whatever --d_lr said
        assert GOLDEN["E_lr_groups_before_after"].tolist() == [[0.0, 1e-4], [0.01, 0.01]]
        self.optimizer = torch.optim.SGD(self.task.parameters(), lr=0.01, momentum=0.9)

    def step(
        self, images: Tensor, batch_targets: BatchTargets, mixture: Mixture | None = None
    ) -> list[float]:
        result = self.task(images, batch_targets, mixture)
        self.optimizer.zero_grad()
        result["loss"].backward()
        self.optimizer.step()
        return [float(result["parts"][f"{name}_loss"]) for name in ("similarity", "discriminator")]

    def ends_as(self, case: str) -> None:
        close(self.student.weight, GOLDEN[f"{case}_student_w_final"])
        close(self.student.bias, GOLDEN[f"{case}_student_b_final"])
        for number, layer in enumerate(linear_layers(self.discriminator), start=1):
            if f"{case}_D_final_conv{number}_w" in GOLDEN:  # the large one is kept once, in E
                close(layer.weight, GOLDEN[f"{case}_D_final_conv{number}_w"])
            close(layer.bias, GOLDEN[f"{case}_D_final_conv{number}_b"])


def online_teachers(*, pooled: bool) -> OnlineTeachers:
    teachers = [network(linear(name), pooled=pooled) for name in ("teacher0", "teacher1")]
    return OnlineTeachers(TeacherEnsemble(teachers), GOLDEN["E_labels_int"][0].tolist())


class OfficialDraws:
    """The random draws of the official CutMix, from NumPy's and torch's global generators."""

    def __init__(self) -> None:
        seed = int(GOLDEN["EC_rng_seed"])
        self._numpy = np.random.RandomState(seed)
        self._torch = torch.Generator().manual_seed(seed)

    def mix(self, num_images: int, img_size: int) -> tuple[Mix, float]:
        self._numpy.rand(1)  # the coin, always mixed
        lam = self._numpy.beta(1.0, 1.0)
        order = torch.randperm(num_images, generator=self._torch)
        row, column = self._numpy.randint(img_size), self._numpy.randint(img_size)
        return Mix(order, cutmix_box(lam, row, column, img_size)), lam


def as_recorded(mix: Mix, lam: float) -> list[float]:
    box = mix.box
    return [lam, box.top, box.left, box.bottom, box.right]


def test_training_with_online_teachers_is_the_official_train_loop() -> None:
    training, targets = Training(pooled=False), online_teachers(pooled=False)
    for step, images in enumerate(tensor("E_images")):
        batch_targets = targets.batch(range(6), [step] * 6, images)
        similarity, adversary = training.step(images, batch_targets)
        close(similarity, GOLDEN["E_g_losses"][step])
        close(adversary, GOLDEN["E_d_losses"][step])
    training.ends_as("E")


def test_teachers_that_label_the_mixed_image_are_the_official_cutmix() -> None:
    training, targets, draws = Training(pooled=True), online_teachers(pooled=True), OfficialDraws()
    for step, images in enumerate(tensor("EC_images")):
        mix, lam = draws.mix(len(images), 8)
        close(np.array(as_recorded(mix, lam)), GOLDEN["EC_lam_and_box"][step])
        mixed = mix.apply(images)
        assert torch.equal(mixed, tensor("EC_images_mixed")[step])
        batch_targets = targets.batch(range(6), [step] * 6, mixed)
        if step == 0:
            assert batch_targets.soft_labels is not None
            close(batch_targets.soft_labels.to_dense(), GOLDEN["EC_soft_labels_step0"])
        similarity, adversary = training.step(mixed, batch_targets)
        close(similarity, GOLDEN["EC_g_losses"][step])
        close(adversary, GOLDEN["EC_d_losses"][step])
    training.ends_as("EC")


def stored_batches() -> Iterator[tuple[Tensor, BatchTargets]]:
    """Yield F's batches: 3 images x 2 crops, crop-major, with their labels of k = 5."""
    batches = zip(tensor("F_images"), GOLDEN["F_packed_k5"], GOLDEN["F_labels_int"], strict=True)
    for images, packed, classes in batches:
        soft = labels_of(packed.reshape(6, 2, 5), "marginal_smoothing_k5", 1000)
        yield images.flatten(0, 1), BatchTargets(soft, torch.from_numpy(classes).flatten())


def test_training_from_stored_labels_is_the_official_fkd_loop() -> None:
    training = Training(pooled=True, shown="probs")
    for step, (images, batch_targets) in enumerate(stored_batches()):
        similarity, adversary = training.step(images, batch_targets)
        close(similarity, GOLDEN["F_g_losses"][step])
        close(adversary, GOLDEN["F_d_losses"][step])
    training.ends_as("F")


def test_labels_mixed_by_area_are_the_official_fkd_cutmix() -> None:
    training, draws = Training(pooled=True, shown="probs"), OfficialDraws()
    for step, (images, batch_targets) in enumerate(stored_batches()):
        mix, lam = draws.mix(len(images), 8)
        close(np.array(as_recorded(mix, lam))[1:], GOLDEN["FC_lam_and_box"][step, 1:])
        share = mix.lam(8)
        mixture = Mixture(partner=batch_targets.rows(mix.order_B), lam=share)
        similarity, adversary = training.step(mix.apply(images), batch_targets, mixture)
        weights = np.array([share, 1.0 - share])
        close(similarity, weights @ GOLDEN["FC_g_losses"][2 * step : 2 * step + 2])
        close(adversary, weights @ GOLDEN["FC_d_losses"][2 * step : 2 * step + 2])
    training.ends_as("FC")


# --- R: label types -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label_type", "packed"),
    [
        ("hard", "hard_int"),
        ("smoothing", "smoothing"),
        ("marginal_smoothing_k5", "marginal_smoothing_k5"),
        ("marginal_smoothing_k10", "marginal_smoothing_k10"),
        ("marginal_renorm_k5", "marginal_renorm_k5"),
        ("marginal_renorm", "marginal_renorm_k5"),
    ],
)
def test_labels_recover_what_the_official_code_recovers(label_type: str, packed: str) -> None:
    labels = labels_of(GOLDEN[f"R_packed_{packed}"], label_type, 1000)
    close(labels.to_dense(), GOLDEN[f"R_dense_{packed.removesuffix('_int')}"])


def test_dense_labels_are_the_probabilities_themselves() -> None:
    probs = GOLDEN["R_probs"]
    close(labels_of(probs, "ori", 1000).to_dense(), probs)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_top_k_keeps_what_the_official_code_keeps(k: int) -> None:
    packed = GOLDEN["R_packed_smoothing" if k == 1 else f"R_packed_marginal_smoothing_k{k}"]
    packed = packed.reshape(6, 2, k)
    kept = top_k(tensor("R_probs"), k)
    assert kept.indices_NK.tolist() == packed[:, 0].astype(int).tolist()
    assert torch.equal(kept.probs_NK, torch.from_numpy(packed[:, 1]))
    assert (kept.indices_NK[:, 0] == tensor("R_packed_hard_int")).all()


@pytest.mark.parametrize(
    ("shape", "label_type", "said"),
    [
        ((6, 2, 5), "marginal", "unknown FKD label type 'marginal'"),
        ((6, 3, 5), "marginal_smoothing_k5", "cannot have the shape"),
        ((6, 10), "marginal_smoothing_k5", "cannot have the shape"),
        ((6, 7), "ori", "cannot have the shape"),
        ((6, 10), "ori", "cannot have the shape"),
        ((6, 5), "hard", "cannot have the shape"),
        ((6, 2, 4), "marginal_smoothing_k5", "cannot have the shape"),
        ((6, 2, 5), "marginal_renorm_k5", "name class 5 of 5"),
    ],
)
def test_labels_of_another_kind_are_refused(
    shape: tuple[int, ...], label_type: str, said: str
) -> None:
    packed = np.zeros(shape)
    packed.reshape(-1)[-1] = packed.flat[0] = 5.0
    with pytest.raises(LabelSetError, match=said):
        labels_of(packed, label_type, 5)


# --- S: rates and boxes; C: crops ---------------------------------------------------------------


def rates(**settings: object) -> list[float]:
    config = FinetuneConfig.from_json(
        {"data_dir": ".", "model": "resnet18", "lr": 0.01, **settings}
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule, found = Schedule(config, optimizer, updates_per_epoch=1), []
    for epoch in range(config.epochs):
        schedule.set_lr(epoch)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_learning_rates_are_those_of_the_official_regime_and_schedules() -> None:
    regime = rates(epochs=301, decay_milestones=[101])
    np.testing.assert_allclose(regime, GOLDEN["S_regime_lr_epoch0_300"], rtol=1e-12)
    step = rates(epochs=200, decay_milestones=[100, 180])[::8]
    np.testing.assert_allclose(step, GOLDEN["S_fkd_step_lr"], rtol=1e-12)
    cosine = rates(epochs=200, sched="cosine")[::8]
    np.testing.assert_allclose(cosine, GOLDEN["S_fkd_cos_lr"], rtol=1e-12)


def test_boxes_are_the_official_ones() -> None:
    for seed, lam, *corners in GOLDEN["S_bbox_seed_lam_x1y1x2y2_224_f64"].tolist():
        draws = np.random.RandomState(int(seed))
        assert draws.beta(1.0, 1.0) == lam
        box = cutmix_box(lam, draws.randint(224), draws.randint(224), 224)
        assert [box.top, box.left, box.bottom, box.right] == corners


def test_cut_equals_the_official_crops_within_one_level() -> None:
    pixels = GOLDEN["C_image_u8"]
    height, width = pixels.shape[:2]
    boxes, crops = GOLDEN["C_coords_ijhw_rel"].tolist(), GOLDEN["C_crops_u8"]
    for (top, left, part_high, part_wide), expected in zip(boxes, crops, strict=True):
        # PIL rounds the corners of a box given in fractions of a pixel
        upper, lower = round(top * height), round((top + part_high) * height)
        start, stop = round(left * width), round((left + part_wide) * width)
        view = View(top=upper, left=start, height=lower - upper, width=stop - start, flip=False)
        crop = cut(pixels, view, 16, resize="pil")
        assert np.abs(crop.astype(int) - expected.astype(int)).max() <= 1
