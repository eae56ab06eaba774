from __future__ import annotations

import subprocess
import sys

import pytest

from tropism.data.config import DataConfig, template_parts
from tropism.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "path is empty"),
        ({"split": ""}, "split is empty"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"first_words": -1}, "first_words must be at least 1"),
        ({"eval_fraction": 1.0}, "eval_fraction must be at least 0 and below 1"),
        ({"eval_fraction": float("nan")}, "eval_fraction"),
        ({"template": "{a}", "prompt_column": "a"}, "keep one of them"),
        ({"template": "{a}", "first_words": 3}, "first_words cuts the text of one column"),
        ({"template": "{a"}, "template '{a': .*for literal braces"),
        ({"template": "}"}, "for literal braces"),
        ({"template": "{}"}, "plain name of a column"),
        ({"template": "{a!r}"}, "plain name of a column"),
        ({"template": "{a:>10}"}, "plain name of a column"),
        ({"template": "{a[0]}"}, "plain name of a column"),
    ],
)
def test_checks(changes, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{"path": "p.txt", **changes})


def test_template_parts():
    assert template_parts("Q: {question} {{x}}\nA:") == [
        ("Q: ", "question"),
        (" {", None),
        ("x}", None),
        ("\nA:", None),
    ]


def test_settings_are_read_without_torch():
    code = "import sys, tropism.data.config, tropism.schema; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
