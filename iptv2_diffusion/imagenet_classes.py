"""The names of ImageNet's 1,000 classes."""

__all__ = ["imagenet_id2label"]


def imagenet_id2label() -> dict[int, str]:
    """Return the names of the classes of ImageNet-1k by number, in the order of their WordNet ids.

    This is the numbering of `ImageFolder` over the original folders, which DiT and U-DiT use. Four of the names occur
    twice.
    """
    from torchvision.models import ResNet50_Weights  # late: torchvision takes a second to import

    return dict(enumerate(ResNet50_Weights.IMAGENET1K_V2.meta["categories"]))
