"""How images are seen: resizing, and the seeded views of training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qskd.config.section import Fraction, Pixels, Positive, Section


class ResizeConfig(Section):
    """How a view becomes the pixels a model sees."""

    # square: height = width = `size`. shortest_edge: shorter side to `size`, longer at most `longest`, aspect ratio kept, and
    # the batch padded to its largest image (DETR's own way).
    mode: Literal["square", "shortest_edge"] = "square"
    size: Pixels = 320  # pixels: both sides, or the shorter one
    longest: Pixels = 1333  # pixels, for shortest_edge

    @property
    def usual_pixels(self) -> int:
        """Of a photograph whose longer side is 1.5 times the shorter: for estimates."""
        return self.size * (self.size if self.mode == "square" else int(min(self.longest, 1.5 * self.size)))


class ViewConfig(Section):
    """The seeded views of each image that training cycles through: 1 costs least to cache, more augments more.

    Their seed is not the run's: runs of other seeds see the same views and share one cache of teacher outputs.
    """

    count: Positive = 1  # different views of an image; every one in an epoch is number epoch % count
    # flip: each epoch draws anew whether its view is mirrored, from seed, image id and epoch. A cache of `count` views serves:
    # what the teacher said of a view is mirrored with it (`qskd cache --verify-derived` says how well that agrees with the
    # teacher). flip_and_crop: its crop too; cached are whole images then, and what the teacher said of one is cropped. none: the
    # same `count` views again and again, as methods that ask the teacher's decoder and `pairing: index` need it. Without a cache
    # the teacher sees what the student sees. null: flip; a run that was begun with none goes on with none.
    derived: Literal["none", "flip", "flip_and_crop"] | None = None
    seed: int = 0  # with the image's id and the view's number, it decides the view
    flip_probability: Fraction = 0.5  # of a view that is mirrored left and right
    crop_probability: Fraction = 0.0  # of a view that is a crop
    crop_min_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5  # smallest crop side over the image's side
    min_visible: Fraction = 0.25  # a box that keeps less of its area than this in a crop is dropped

    @property
    def derived_taken(self) -> Literal["none", "flip", "flip_and_crop"]:
        """What `derived` comes to: with null, flips where there are any to draw (docs/evidence.md has what they are worth)."""
        return self.derived or ("flip" if 0 < self.flip_probability < 1 else "none")
