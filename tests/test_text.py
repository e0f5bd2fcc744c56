"""What the text module promises and a notebook cannot show."""

import subprocess
import sys


def test_text_imports_lightly() -> None:
    "Tokenizing plain captions needs neither open_clip (four seconds) nor ftfy, in a fresh process."
    code = (
        "import sys; from difflit.text import trimmed_tokenizer; trimmed_tokenizer(['a red circle'])(['a red circle', '']);"
        "print({'open_clip', 'ftfy', 'torchvision', 'timm', 'transformers'} & set(sys.modules))"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == "set()", fresh.stdout
