"""What the annotator itself says of a demo study's images: its reward, how right the colours are, and colourfulness.

    python demo/measure_study.py generated_images/compare_quality/demo     # after python compare_quality.py --demo

The studies score with judges that were trained on the annotator's labels; this is what they were trained to tell. It prints
a row for each folder of images: means with 95 % bootstrap intervals.
"""

from dataclasses import dataclass
from pathlib import Path

import annotator
import numpy as np
import pandas as pd
import tyro
from common import mean
from PIL import Image

from dipo import cli
from dipo.files import read_record


@dataclass
class Settings:
    study: tyro.conf.Positional[str]
    """the output folder of a study's --demo"""


def main(s: Settings) -> None:
    rows = []
    for folder in sorted(p for p in Path(s.study).iterdir() if p.is_dir()):
        values = {"reward": [], "rightness": [], "colourfulness M": []}
        for path in sorted(folder.glob("*.png")):
            caption = read_record(path)["prompt"]
            with Image.open(path) as image:
                right = annotator.rightness(image, annotator.scene_of(caption))
                values["reward"].append(annotator.reward(image, caption))
                values["rightness"].append(np.mean(list(right.values())))
                values["colourfulness M"].append(annotator.colourfulness(image))
        row = {"images": folder.name, "n": len(values["reward"])}
        rows.append(row | {name: mean(x) for name, x in values.items()})
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
