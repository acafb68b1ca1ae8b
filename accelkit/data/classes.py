"""The classes of a data set: their names, their labels, and the label of each image."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath

import numpy as np

from accelkit.data.captions import Captions
from accelkit.data.class_map import ClassMap
from accelkit.data.listing import Files
from accelkit.data.metadata import Label
from accelkit.errors import AccelkitError, AccelkitWarning, one_line

_PARTS = {
    *("train", "training", "test", "testing", "val", "valid", "validation", "eval", "dev"),
    *("data", "images", "image", "img", "imgs", "jpeg", "jpg", "photos", "pictures", "png"),
}
"""Names of folders that hold a part of a data set or all of it, and are not classes."""

_SHARD = re.compile(r"(\d{5})/(img)?\1\d{3,4}\.\w+")
"""An image in a shard: ``00012/img00012345.png`` by NVlabs' tools, ``00012/000120345.jpg`` by
img2dataset."""


@dataclass(frozen=True)
class Classes:
    """Classes and their labels.

    Attributes:
        names: class names in the order of their labels.
        labels: the label of each class, rising.
        of_images: the label of each image, int64 (n,).
        recorded: whether the labels come from a file, not from the names of folders.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    of_images: np.ndarray
    recorded: bool = False

    def mapped(self, given: ClassMap, where: str) -> Classes:
        """Return the same classes with the labels that a class map gives them.

        Raises:
            AccelkitError: the map has no label for a class, gives two classes the same label, or
                names a class that the data do not have.
        """
        if missing := [name for name in self.names if name not in given.labels]:
            raise AccelkitError(
                f"the class map {given.where} has no label for {len(missing)} of "
                f"{len(self.names)} classes of {where}, e.g. {missing[0]}; add what is missing"
            )
        unknown = sorted(given.labels.keys() - set(self.names))
        if unknown and not given.of_model:
            raise AccelkitError(
                f"the class map {given.where} names {unknown[0]}, which is not a class of {where} "
                f"({', '.join(self.names[:3])}, …); correct it, or remove it"
            )
        order = sorted(self.names, key=given.labels.__getitem__)
        labels = [given.labels[name] for name in order]
        for (name, label), (other, again) in pairwise(zip(order, labels, strict=True)):
            if label == again:
                raise AccelkitError(
                    f"the class map {given.where} gives {name} and {other} the label {label}; give "
                    "each its own, or put their images into one folder"
                )
        table = np.array([given.labels[name] for name in self.names], dtype=np.int64)
        places = np.searchsorted(np.array(self.labels), self.of_images)
        return Classes(tuple(order), tuple(labels), table[places], recorded=True)

    def warn(self, where: str) -> None:
        """Warn of labels that are probably not the intended ones."""
        each = zip(self.names, self.labels, strict=True)
        wrong = [
            (name, label) for name, label in each if name.lstrip("0") != f"{label}".lstrip("0")
        ]
        if wrong and all(re.fullmatch("-?[0-9]+", name) for name in self.names):
            _warn(
                f"the classes of {where} are numbers, but their labels are their places in the "
                f"sorted list: {wrong[0][0]} has {wrong[0][1]}; if the numbers are a model's "
                "labels, give them in a --class-map"
            )
        folded: dict[str, str] = {}
        for name in self.names:
            first = folded.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
            if first != name:
                _warn(
                    f"{first} and {name} in {where} are two classes whose names differ only in "
                    "case; put their images into one folder if they are the same class"
                )


def folder_classes(
    files: Files, images: Sequence[PurePosixPath], captions: Captions
) -> Classes | None:
    """Return a class for each outermost folder, labelled 0, 1, … by sorted name, or None.

    Raises:
        AccelkitError: images without captions are next to class folders; a class folder is empty,
            is a broken link, or holds folders instead of images.
    """
    names = sorted({image.parts[0] for image in images if len(image.parts) > 1})
    loose = [image for image in images if len(image.parts) == 1]
    if not names or all(_SHARD.fullmatch(str(image)) for image in images):
        return None
    if loose and captions:
        captions.check()  # otherwise a stray text file would remove the classes
        return None
    if loose:
        raise AccelkitError(
            f"{files.where} holds images ({loose[0]}, …) next to class folders "
            f"({names[0]}, …); put every image into a class, or remove the folders"
        )
    _check_folders(files, images, names)
    if all(name.lower() in _PARTS for name in names):
        if len(names) == 1 and all(len(image.parts) == 2 for image in images):
            return None
        raise AccelkitError(
            f"{files.where} holds parts of a data set ({', '.join(names[:3])}) where classes are "
            f"expected; name the part, as in {files.where}/{names[0]}"
        )
    places = {name: place for place, name in enumerate(names)}
    labels = np.array([places[image.parts[0]] for image in images], dtype=np.int64)
    return Classes(tuple(names), tuple(places.values()), labels)


def recorded_classes(
    files: Files, images: Sequence[PurePosixPath], labels: Mapping[PurePosixPath, Label]
) -> Classes:
    """Return the classes recorded in a file: numbers are labels, names get 0, 1, … when sorted.

    Raises:
        AccelkitError: an image has no label, or some have numbers and others names.
    """
    if bare := [image for image in images if image not in labels]:
        raise AccelkitError(
            f"{len(bare)} of {len(images)} images in {files.where} have no label, e.g. {bare[0]}, "
            "though others have one in dataset.json or metadata; add theirs, or remove them"
        )
    given = {labels[image] for image in images}
    if len({type(label) for label in given}) > 1:
        raise AccelkitError(
            f"the labels in {files.where} are partly numbers and partly names; use only one kind"
        )
    ordered = sorted(given)
    table = {g: place if isinstance(g, str) else g for place, g in enumerate(ordered)}
    of_images = np.array([table[labels[image]] for image in images], dtype=np.int64)
    return Classes(tuple(map(str, ordered)), tuple(table.values()), of_images, recorded=True)


def _check_folders(files: Files, images: Sequence[PurePosixPath], names: Sequence[str]) -> None:
    where = files.where
    if files.links:
        raise AccelkitError(
            f"{where}/{min(files.links)} is a link whose target cannot be read here; if it is a "
            "class, the labels of others would change without it; restore or pack the target, or "
            "remove the link"
        )
    if empty := sorted(files.folders - set(names)):
        raise AccelkitError(
            f"{where}/{empty[0]} holds no images, and without it the classes after it would "
            "have other labels; put images into it, or remove it"
        )
    own = {image.parts[0] for image in images if len(image.parts) == 2}
    within = sorted({image.parts[:2] for image in images if image.parts[0] not in own})
    # a class may keep its images in a single sub-folder, as in Tiny ImageNet
    for (name, first), (again, second) in pairwise(within):
        if name == again:
            raise AccelkitError(
                f"{where}/{name} holds folders of images ({first}, {second}, …) where a class "
                f"holds images; name the part that holds the classes, as in {where}/{name}"
            )


def _warn(text: str) -> None:
    warnings.warn(one_line(text), AccelkitWarning, stacklevel=4)
