"""Makes assets/fonts from the npm packages @fontsource/*: one TrueType file per look, printable ASCII only, no hints.

Needs npm on the path, and fonttools 4.68 and brotli 1.2. Run it without arguments; it rewrites the folder `fonts`.
"""

import subprocess
import tarfile
import tempfile
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

# package, version, weight, name of the file that comes out
FONTS = [
    ("roboto", "5.3.0", 400, "sans"),
    ("roboto-slab", "5.3.0", 700, "slab"),
    ("tinos", "5.3.0", 400, "serif"),
    ("cousine", "5.3.0", 400, "mono"),
    ("oswald", "5.3.0", 400, "condensed"),
    ("nunito", "5.3.0", 700, "rounded"),
]


def shrink(source: Path, target: Path) -> None:
    options = subset.Options()
    options.hinting = False
    options.layout_features = []
    options.name_IDs = [0, 1, 2, 13]
    options.notdef_outline = True
    options.drop_tables += ["GSUB", "GPOS", "GDEF", "DSIG", "STAT", "gasp"]
    font = TTFont(source, recalcTimestamp=False)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=range(0x20, 0x7F))
    subsetter.subset(font)
    font.flavor = None
    font.save(target)


def main() -> None:
    folder = Path(__file__).parent / "fonts"
    folder.mkdir(exist_ok=True)
    notice = ["Fonts of this folder: subsets (printable ASCII, no hints) of the files in these npm packages.", ""]
    with tempfile.TemporaryDirectory() as scratch:
        for package, version, weight, look in FONTS:
            name = f"@fontsource/{package}@{version}"
            packed = subprocess.run(
                ["npm", "pack", "--silent", name], cwd=scratch, check=True, capture_output=True, text=True
            ).stdout.split()[-1]
            unpacked = Path(scratch) / package
            with tarfile.open(Path(scratch) / packed) as archive:
                archive.extractall(unpacked, filter="data")
            inner = unpacked / "package"
            shrink(inner / "files" / f"{package}-latin-{weight}-normal.woff2", folder / f"{look}.ttf")
            licence = (inner / "LICENSE").read_text()
            (folder / f"{look}.LICENSE.txt").write_text("\n".join(l.rstrip() for l in licence.splitlines()).strip() + "\n")
            notice.append(f"{look}.ttf: {name}, weight {weight}; licence in {look}.LICENSE.txt")
    (folder / "NOTICE").write_text("\n".join(notice) + "\n")


if __name__ == "__main__":
    main()
