"""Blocks of timm's models and of others, their alignment, and which of them pair."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from mealv2.errors import ConfigError
from mealv2.meal import BlockLayers, Network, align, block_outputs, pair_blocks
from mealv2.models import Classifier, Preprocessing

pytestmark = pytest.mark.usefixtures("seeded_weights")
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Own(nn.Module):
    """A network of one's own: blocks of these shapes, then logits."""

    def __init__(self, *shapes: tuple[int, ...], num_classes: int = 3) -> None:
        super().__init__()
        self.shapes = shapes
        self.num_classes = num_classes
        self.scale = nn.Parameter(torch.ones(()))

    def forward_blocks(self, images_BCHW: Tensor) -> list[Tensor]:
        mean_B = images_BCHW.mean(dim=(1, 2, 3)) * self.scale
        blocks = [
            mean_B.view(-1, *[1] * len(shape)).expand(-1, *shape) * (number + 1)
            for number, shape in enumerate(self.shapes)
        ]
        return [*blocks, mean_B[:, None].expand(-1, self.num_classes)]

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.forward_blocks(images_BCHW)[-1]


def network(*shapes: tuple[int, ...], name: str = "own", num_classes: int = 3) -> Network:
    return Network(name, Own(*shapes, num_classes=num_classes), 8)


# --- blocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_blocks"),
    [
        ("test_resnet", 5),
        ("test_efficientnet", 5),
        ("test_byobnet", 5),
        ("test_nfnet", 5),
        ("test_convnext", 4),
        ("test_mambaout", 4),
    ],
)
def test_a_model_of_timm_gives_maps_and_the_logits_of_its_forward(
    name: str, num_blocks: int
) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    with torch.no_grad():
        *blocks, logits = block_outputs(model, IMAGES)
        torch.testing.assert_close(logits, model(IMAGES))
    assert len(blocks) == num_blocks
    assert all(block.ndim == 4 and len(block) == 2 for block in blocks)
    sides = [block.shape[-1] for block in blocks]
    assert sides == sorted(sides, reverse=True)


def test_a_vision_transformer_gives_maps_of_its_tokens() -> None:
    model = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    *blocks, _ = block_outputs(model, IMAGES)
    assert {block.shape for block in blocks} == {(2, 64, 2, 2)}


def test_a_classifier_normalises_before_its_backbone() -> None:
    backbone = timm.create_model("test_resnet", num_classes=3).eval()
    model = Classifier(backbone, tag="", preprocessing=Preprocessing((0.5,) * 3, (0.25,) * 3))
    found = block_outputs(model, (IMAGES * 255).round().to(torch.uint8))
    expected = block_outputs(backbone, ((IMAGES * 255).round() / 255 - 0.5) / 0.25)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_network_without_blocks_is_named_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"Linear does not give its blocks.*--out-layer -1"):
        block_outputs(nn.Linear(3, 3), IMAGES)


def test_logits_alone_need_no_blocks() -> None:
    outputs, logits = BlockLayers().outputs(nn.Flatten(), IMAGES)
    assert [x.shape for x in outputs] == [logits.shape] == [(2, 3 * 32 * 32)]


def test_outputs_are_the_aligned_blocks_in_the_order_of_the_positions() -> None:
    own = Own((4, 3, 3), (6, 2, 2))
    outputs, logits = BlockLayers((1, 0, -1), (5, 7, None), "avg").outputs(own, IMAGES)
    first, second, last = own.forward_blocks(IMAGES)
    assert torch.equal(outputs[0], align(second, 5, "avg"))
    assert torch.equal(outputs[1], align(first, 7, "avg"))
    assert torch.equal(outputs[2], last)
    assert torch.equal(logits, last)


# --- pairs --------------------------------------------------------------------------------------


def test_alignment_makes_blocks_of_other_shapes_pair() -> None:
    student, teacher = network((4, 3, 3), (6, 2, 2)), network((9, 5, 5), (2, 1, 1))
    layers, widths = pair_blocks([student, teacher], (0, 1, 2), sizes=(7, 5), pool="avg")
    assert widths == (7, 5, 3)
    assert layers == BlockLayers((0, 1, 2), (7, 5, None), "avg")


def test_without_lengths_those_of_meal_or_of_the_student_count() -> None:
    both = [network((4, 3, 3), (6, 2, 2)), network((4, 3, 3), (6, 2, 2))]
    assert pair_blocks(both, (0, -2, -1))[1] == (5000, 1000, 3)
    both[0].module.default_out_dims = (40, 20, 3)  # type: ignore[assignment]
    assert pair_blocks(both, (-2, -1))[1] == (20, 3)


def test_from_the_end_lists_of_other_lengths_pair() -> None:
    both = [network((4, 3, 3), (6, 2, 2)), network((6, 2, 2))]
    assert pair_blocks(both, (-2, -1), pool=None)[1] == (24, 3)


@pytest.mark.parametrize(
    ("teacher", "positions", "options", "words"),
    [
        (((6, 2, 2),), (0, -1), {}, "own student has 2 blocks and vgg has 1"),
        (((4, 3, 3), (5, 2, 2)), (1,), {"pool": None}, "has 24 values there, vgg has 20"),
        (((4, 3, 3), (6, 2, 2)), (3,), {}, "has 2 blocks and the logits, positions 0 to 2"),
        (((4, 3, 3), (6, 2, 2)), (-4,), {}, "positions 0 to 2"),
        (((4, 3, 3), (6, 2, 2)), (2, -1), {}, "names a block twice: 2, -1"),
        (((4, 3, 3), (6, 2, 2)), (0, 1, 2), {"sizes": (7,)}, "has 1 values, --out-layer 2 blocks"),
        (((4, 3, 3), (6, 2, 2)), (1, 2), {"sizes": (7, 9)}, "--out-dims 9 .* the logits are 3"),
        (((4, 3), (6, 2, 2)), (0, 2), {"sizes": (7,)}, "vgg: features have shape"),
    ],
)
def test_what_does_not_pair_is_refused_naming_both_networks_and_their_sizes(
    teacher: tuple[tuple[int, ...], ...],
    positions: tuple[int, ...],
    options: dict[str, Any],
    words: str,
) -> None:
    networks = [network((4, 3, 3), (6, 2, 2), name="own student"), network(*teacher, name="vgg")]
    with pytest.raises(ConfigError, match=words):
        pair_blocks(networks, positions, **options)


def test_logits_of_other_lengths_do_not_pair() -> None:
    both = [network(name="student"), network(name="teacher", num_classes=5)]
    with pytest.raises(ConfigError, match="student has 3 values there, teacher has 5"):
        pair_blocks(both, (-1,))


def test_blocks_that_end_in_other_logits_are_refused() -> None:
    wrong = network((4, 3, 3))
    wrong.module.forward = lambda images: torch.ones(len(images), 3)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="own: what its blocks end in is not the logits"):
        pair_blocks([wrong], (0, -1))


def test_pairing_leaves_modes_and_gradients_as_they_were() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    model.layer1.eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    pair_blocks([Network("a", model, 32)], (-2, -1), sizes=(8,))
    assert modes == [part.training for part in model.modules()]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
