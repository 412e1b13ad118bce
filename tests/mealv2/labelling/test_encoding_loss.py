"""mealv2.labelling.encoding_loss: what the labels of a set lose, measured while they are made."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mealv2.data.memory import ImageSequence
from mealv2.data.requests import Batch
from mealv2.label_set import Encoding
from mealv2.labelling import annotator
from mealv2.labelling.annotator import Annotations, Annotator
from mealv2.labelling.encoding_loss import encoding_loss, kl_of_rows, sample_size
from mealv2.models.ensemble import TeacherEnsemble
from mealv2.runtime import LocalRuntime
from mealv2.soft_labels import top_k

CPU = torch.device("cpu")


def drawn_probs(rows: int, classes: int = 20, seed: int = 0) -> Tensor:
    logits_NC = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))
    return (3.0 * logits_NC).softmax(1)


def kl_reference(probs_NC: Tensor, recovered_NC: Tensor) -> np.ndarray:
    p_NC, q_NC = probs_NC.double().numpy(), recovered_NC.double().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        terms_NC = np.where(p_NC > 0, p_NC * (np.log(p_NC) - np.log(q_NC)), 0.0)
    return np.asarray(terms_NC.sum(1))


def test_the_loss_is_the_mean_kl_of_the_first_rows_in_three_digits() -> None:
    probs_NC = drawn_probs(96)
    labels = Encoding(20, rate=0.01).encode(probs_NC, num_views=8).labels
    recovered_NC = labels.to_dense()
    expected_N = kl_reference(probs_NC, recovered_NC)
    np.testing.assert_allclose(kl_of_rows(probs_NC, recovered_NC), expected_N, atol=1e-9)
    found = encoding_loss(probs_NC[:64], labels)
    assert found is not None
    assert found == (float(f"{expected_N[:64].mean():.3g}"), 64)
    assert f"{expected_N.mean():.3g}" != f"{found.kl:.3g}"


def test_dense_labels_lose_nothing_and_no_labels_have_no_loss() -> None:
    probs_NC = drawn_probs(8)
    assert encoding_loss(probs_NC, top_k(probs_NC, 20)) == (0.0, 8)
    assert encoding_loss(probs_NC[:0], top_k(probs_NC[:0], 20)) is None


def test_a_class_of_probability_0_loses_nothing() -> None:
    probs_NC = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    recovered_NC = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
    np.testing.assert_allclose(kl_of_rows(probs_NC, recovered_NC), [np.log(2.0), 0.0])


@pytest.mark.parametrize(
    ("num_views", "rows"), [(1, 64), (4, 64), (7, 63), (32, 64), (33, 33), (180, 180)]
)
def test_all_views_of_whole_images_are_measured(num_views: int, rows: int) -> None:
    assert sample_size(num_views) == rows


# --- in the annotator -----------------------------------------------------------------------------

NUM_IMAGES, NUM_VIEWS, RATE = 20, 5, Encoding(3, rate=0.05)
PIXELS = (drawn_probs(NUM_IMAGES * NUM_VIEWS, 3, seed=1) * 255.0).byte()


class Pixels(nn.Module):
    """A teacher whose logits are the colours of a pixel."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW[:, :, 0, 0].float() / 40.0


def annotated(batch_size: int, *, bad_image: int | None = None) -> Annotations:
    """Label all views of images of one pixel; the third view of a bad image cannot be read."""
    source = ImageSequence([(f"{n}", b"", n % 3) for n in range(NUM_IMAGES)], classes="abc")
    ensemble = TeacherEnsemble([Pixels()])
    maker = Annotator(ensemble, LocalRuntime(CPU, None), RATE, batch_size, "skip")
    batches = []
    all_rows = range(len(PIXELS))
    for some in (all_rows[at : at + batch_size] for at in all_rows[::batch_size]):
        bad = [row for row in some if divmod(row, NUM_VIEWS) == (bad_image, 2)]
        rows = [row for row in some if row not in bad]
        batches.append(
            Batch(
                PIXELS[rows][:, :, None, None],
                np.ones((len(rows), 2), np.uint32),
                np.zeros((len(rows), 5), np.uint32),
                positions=[row // NUM_VIEWS for row in rows],
                failed={row // NUM_VIEWS: "damaged" for row in bad},
            )
        )
    return maker.annotate(source, batches, num_views=NUM_VIEWS, count_correct=False)


@pytest.mark.parametrize("bad_image", [None, 0, 3])
@pytest.mark.parametrize("batch_size", [3, 16, 100])
def test_the_first_images_with_labels_are_measured_in_any_batches(
    batch_size: int, bad_image: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotator, "_MAX_VIEWS", 20)  # several calls of the encoder
    found = annotated(batch_size, bad_image=bad_image)
    images = [image for image in range(NUM_IMAGES) if image != bad_image][:12]
    rows = [image * NUM_VIEWS + view for image in images for view in range(NUM_VIEWS)]
    probs_NC = (PIXELS[rows].float() / 40.0).softmax(1)
    recovered_NC = RATE.encode(probs_NC, num_views=NUM_VIEWS).labels.to_dense()
    expected = kl_reference(probs_NC, recovered_NC).mean()
    assert expected > 1e-4
    assert found.loss == (float(f"{expected:.3g}"), 60)
