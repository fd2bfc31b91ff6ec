"""The photos that preprocessing leaves out, and why."""

import csv

from captioning.storage.files import atomic_path
from utils import UserError


class LeftOut:
    """The photos that were left out and why, in a CSV file beside the data; no file when there are none."""

    def __init__(self, path, num_photos, max_unreadable):
        """
        :param path: of the CSV file
        :param num_photos: in the annotations
        :param max_unreadable: share of them that may be missing or damaged, 0 to 1
        """
        self.path, self.num_photos, self.max_unreadable = path, num_photos, max_unreadable
        self.rows = []
        self.unreadable = []  # (file name, reason) of those among them that are missing or damaged

    def add(self, photo, reason, unreadable=True):
        """
        :param photo: AnnotatedPhoto
        :param unreadable: whether it counts as missing or damaged
        """
        self.rows.append((photo.split or "", photo.file_name, reason))
        if unreadable:
            self.unreadable.append((photo.file_name, reason))

    def save(self):
        """
        Write the file as it stands.

        :raises UserError: if too many photos are missing or damaged
        """
        self.path.unlink(missing_ok=True)
        if self.rows:
            with (
                atomic_path(self.path) as temporary,
                temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
            ):
                csv.writer(file).writerows([("split", "file_name", "reason"), *self.rows])
        if len(self.unreadable) > self.max_unreadable * self.num_photos:
            file_name, reason = self.unreadable[0]
            raise UserError(
                f"image_folder: {len(self.unreadable)} of {self.num_photos} photos are missing or cannot be read, at "
                f"most {self.max_unreadable:.1%} allowed. The first is {file_name[:80]!r}: {reason[:300]}. {self.path} "
                "names them all; replace them, or raise --max_unreadable"
            )

    def summarize(self):
        """Print how many photos were left out."""
        without_caption = len(self.rows) - len(self.unreadable)
        if self.unreadable:
            print(f"Missing or damaged photos: {len(self.unreadable)}, left out")
        if without_caption:
            print(f"Photos without a usable caption: {without_caption}, left out")
        if self.rows:
            print(f"They are named in {self.path}")
