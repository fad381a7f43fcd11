"""The losses: pure functions, then one module that sums them.

Shapes: similarities (B, num_classes, K) are cosines at the best cell, labels (B,) are class numbers, prototypes
(num_classes, K, D) have unit norm, used (num_classes, K) marks the slots in use.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protopush.nn.head import HeadOutput
from protopush.nn.prototypes import PrototypeManager


def cluster_loss(similarities: Tensor, labels: Tensor, used: Tensor) -> Tensor:
    """Each image should have a patch near some prototype of its class: mean of ``1 - max_k s[b, y_b, k]``.

    Source: ProtoPNet (Chen et al., 2019), with cosine in place of L2.

    Example:
        >>> s = torch.tensor([[[0.2, 0.9], [0.5, 0.5]]])
        >>> cluster_loss(s, torch.tensor([0]), torch.ones(2, 2, dtype=torch.bool))
        tensor(0.1000)
    """
    own = _own(similarities.masked_fill(~used, -1.0), labels)
    return (1.0 - own.amax(dim=1)).mean()


def grounding_loss(similarities: Tensor, labels: Tensor, used: Tensor) -> Tensor:
    """Each prototype should be near some patch of its class: mean over prototypes of ``1 - max_b s[b, c, k]``.

    b runs over the batch's images of the prototype's class; classes that the batch lacks don't count. Prototypes that
    lie near real patches lose little when a hard push puts them onto one.

    Source: the first interpretability term of Li et al. (2018), over patches instead of images.

    Example:
        >>> s = torch.tensor([[[0.2, 0.9]], [[0.6, 0.5]]])
        >>> grounding_loss(s, torch.tensor([0, 0]), torch.ones(1, 2, dtype=torch.bool))
        tensor(0.2500)
    """
    own_class = F.one_hot(labels, similarities.shape[1]).bool()
    nearest = similarities.masked_fill(~own_class.unsqueeze(2), -1.0).amax(dim=0)
    counted = used & own_class.any(dim=0).unsqueeze(1)
    return ((1.0 - nearest) * counted).sum() / counted.sum().clamp(min=1)


def separation_loss(similarities: Tensor, labels: Tensor, used: Tensor, margin: float = 0.3) -> Tensor:
    """No patch should be near a prototype of another class: mean of ``relu(max s - margin)`` over other classes.

    Source: ProtoPNet (Chen et al., 2019); hinge as in TesNet (Wang et al., 2021).

    Example:
        >>> s = torch.tensor([[[0.2, 0.9], [0.5, 0.4]]])
        >>> separation_loss(s, torch.tensor([0]), torch.ones(2, 2, dtype=torch.bool), margin=0.3)
        tensor(0.2000)
    """
    own_class = F.one_hot(labels, similarities.shape[1]).bool().unsqueeze(2)
    others = similarities.masked_fill(own_class | ~used, -1.0)
    return F.relu(others.flatten(1).amax(dim=1) - margin).mean()


def orthogonality_loss(prototypes: Tensor, used: Tensor) -> Tensor:
    """Prototypes of a class should differ: mean squared cosine between two different ones of the same class.

    Source: soft orthogonality (Bansal et al., 2018), within a class as in TesNet (Wang et al., 2021).

    Example:
        >>> orthogonality_loss(torch.eye(2).unsqueeze(0), torch.ones(1, 2, dtype=torch.bool))
        tensor(0.)
    """
    gram = prototypes @ prototypes.transpose(1, 2)
    pairs = used.unsqueeze(2) & used.unsqueeze(1) & ~torch.eye(used.shape[1], dtype=torch.bool, device=used.device)
    return (gram.square() * pairs).sum() / pairs.sum().clamp(min=1)


def consistency_loss(similarities: Tensor, labels: Tensor, used: Tensor, temperature: float = 0.1) -> Tensor:
    """Images of a class should use its prototypes alike.

    Each image's use of its class's prototypes is ``softmax_k(s[b, y_b, k] / temperature)``; the loss is the mean
    squared distance to the batch's mean use in that class. 0 where each class has at most one image in the batch.

    Source: the training counterpart of the consistency score of Huang et al. (2023).

    Example:
        >>> s = torch.tensor([[[0.9, 0.1]], [[0.9, 0.1]]])
        >>> consistency_loss(s, torch.tensor([0, 0]), torch.ones(1, 2, dtype=torch.bool))
        tensor(0.)
    """
    own = _own(similarities.masked_fill(~used, -torch.inf), labels)
    use = torch.softmax(own / temperature, dim=1)
    same = (labels.unsqueeze(1) == labels.unsqueeze(0)).to(use.dtype)
    mean_use = same @ use / same.sum(dim=1, keepdim=True)
    return (use - mean_use).square().sum(dim=1).mean()


def off_mask_loss(out: HeadOutput, labels: Tensor, used: Tensor, outside: Tensor) -> Tensor:
    """How similar a class's prototypes are to patches of its images that lie off the marked region.

    ``mean over images and prototypes of max_l relu(cos(z_l, p)) * outside_l``: 0 where each prototype is found on the
    region alone. No mask is needed to predict.

    Args:
        out: of a batch of B images.
        labels: (B,).
        used: bool (num_classes, K).
        outside: (B, L), the share of each patch that lies off the region; 0 for an image without a mask.

    Source: the fine-annotation loss of IAIA-BL (Barnett et al., 2021), whose norm over the map is a maximum here, as in
    the score.

    Example:
        >>> patches, prototypes = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]]), torch.tensor([[[1.0, 0.0]]])
        >>> out = HeadOutput(*[torch.zeros(0)] * 4, patches, prototypes)
        >>> off_mask_loss(out, torch.tensor([0]), torch.ones(1, 1, dtype=torch.bool), torch.tensor([[0.0, 0.5]]))
        tensor(0.3000)
    """
    own = out.embeddings @ out.prototypes[labels].transpose(1, 2)  # (B, L, K)
    worst = (own.relu() * outside.unsqueeze(2)).amax(dim=1)
    return (worst * used[labels]).sum() / used[labels].sum()


def _own(similarities: Tensor, labels: Tensor) -> Tensor:
    """The similarities to each image's own class, (B, K)."""
    return similarities[torch.arange(len(labels), device=labels.device), labels]


class PrototypeLoss(nn.Module):
    """The weighted sum of the losses.

    Args:
        class_weights: (num_classes,) for the cross-entropy, or None.
        grounding, cluster, separation, orthogonality, consistency, off_mask: weights of the terms; a term of weight 0
            isn't computed, nor off_mask where it isn't known what lies outside.
        separation_margin: the cosine up to which another class's prototype may be similar.
        label_smoothing: of the cross-entropy.
        shift: (num_classes,), added to the logits of the cross-entropy (:func:`logit_shift`), or None.

    ``forward`` returns the sum and the terms by name, before weighting.
    """

    class_weights: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        class_weights: Tensor | None = None,
        grounding: float = 0.0,
        cluster: float = 0.0,
        separation: float = 0.0,
        orthogonality: float = 0.0,
        consistency: float = 0.0,
        off_mask: float = 0.0,
        separation_margin: float = 0.3,
        label_smoothing: float = 0.0,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights)
        self.register_buffer("shift", shift)
        self.weights = {
            "grounding": grounding,
            "cluster": cluster,
            "separation": separation,
            "orthogonality": orthogonality,
            "consistency": consistency,
            "off_mask": off_mask,
        }
        self.separation_margin = separation_margin
        self.label_smoothing = label_smoothing

    def forward(
        self, out: HeadOutput, labels: Tensor, manager: PrototypeManager, off_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and its terms, as scalars; ``off_mask`` is that of :func:`off_mask_loss`, where known."""
        used = manager.mask()
        terms = {
            "grounding": lambda: grounding_loss(out.similarities, labels, used),
            "cluster": lambda: cluster_loss(out.similarities, labels, used),
            "separation": lambda: separation_loss(out.similarities, labels, used, self.separation_margin),
            "orthogonality": lambda: orthogonality_loss(out.prototypes, used),
            "consistency": lambda: consistency_loss(out.similarities, labels, used),
        }
        if off_mask is not None:
            terms["off_mask"] = lambda: off_mask
        logits = out.logits if self.shift is None else out.logits + self.shift
        entropy = F.cross_entropy(logits, labels, self.class_weights, label_smoothing=self.label_smoothing)
        values = {name: terms[name]() for name, weight in self.weights.items() if weight and name in terms}
        total = entropy + sum((self.weights[name] * value for name, value in values.items()), entropy.new_zeros(()))
        return total, {"cross_entropy": entropy.detach()} | {name: v.detach() for name, v in values.items()}


def balanced_class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Weights (num_classes,) inversely proportional to class frequency, with mean 1 over the samples.

    Example:
        >>> balanced_class_weights(torch.tensor([0, 0, 0, 1]), 2)
        tensor([0.6667, 2.0000])
    """
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1).float()
    return len(labels) / (num_classes * counts)


def effective_class_weights(labels: Tensor, num_classes: int, beta: float = 0.999) -> Tensor:
    """Weights (num_classes,) inversely proportional to the effective number of samples, with mean 1 over the samples.

    n samples of a class count for ``(1 - beta**n) / (1 - beta)``, since each further one adds less that is new.

    Source: Cui et al., 2019, "Class-Balanced Loss Based on Effective Number of Samples".

    Example:
        >>> effective_class_weights(torch.tensor([0, 0, 0, 1]), 2, beta=0.5)
        tensor([0.8421, 1.4737])
    """
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1).double()
    weights = (1.0 - beta) / (1.0 - beta**counts)
    return (weights * len(labels) / (weights * counts).sum()).float()


def logit_shift(labels: Tensor, num_classes: int, strength: float = 1.0) -> Tensor:
    """What logits are raised by in training, (num_classes,): ``strength * log(share of the class)``.

    A model that learns with it and predicts without is consistent for balanced accuracy.

    Source: Menon et al., 2021, "Long-tail Learning via Logit Adjustment".

    Example:
        >>> logit_shift(torch.tensor([0, 0, 0, 1]), 2)
        tensor([-0.2877, -1.3863])
    """
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1).float()
    return strength * (counts / counts.sum()).log()
