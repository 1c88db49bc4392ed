"""Write the batch script and the site profiles to a directory, to be changed there.

    python -m trak_dist.site_files DIR

They are in `launch/` in the repository, in `trak_dist/site` in the wheel.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent
FILES = next(p for p in (PACKAGE / "site", PACKAGE.parent / "launch") if p.is_dir())


def main(arguments: Sequence[str] | None = None) -> None:
    """Copy them; a file that is there is kept."""
    parser = argparse.ArgumentParser(prog="python -m trak_dist.site_files", description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args(arguments).directory
    for source in sorted([*FILES.glob("*.sbatch"), *FILES.glob("profiles/*.yaml")]):
        target = directory / source.relative_to(FILES)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            print(f"kept   {target}")
        else:
            shutil.copyfile(source, target)
            print(f"wrote  {target}")


if __name__ == "__main__":
    main()
