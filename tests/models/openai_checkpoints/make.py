"""Writes the checkpoints beside it with TensorFlow itself, as OpenAI's programs do. Run once:

    pip install tensorflow-cpu==2.21.0
    PYTHONPATH=tests python tests/models/openai_checkpoints/make.py

gpt2/ is a language model as OpenAI published it; run/ is what openai/lm-human-preferences saves: a reward model and a
policy, whose checkpoints also hold the policy that training started from, a few moments of Adam (of a few variables
only, to keep the files small) and counters. The tests know all numbers from tests/openai_gpt2.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tensorflow.compat.v1 as tf  # type: ignore[import-not-found,import-untyped,unused-ignore]

from openai_gpt2 import BIAS, CHECKPOINTS, GAIN, HEAD_BIAS, MERGES, SIZES, encoder, variables, weights_of


def make_model(scope: str, sizes: dict[str, int]) -> None:
    for name, shape in variables(scope, sizes):
        tf.get_variable(name, initializer=weights_of(name, shape))


def make_head(name: str, width: int, bias: float) -> None:
    tf.get_variable(f"{name}/w", initializer=weights_of(f"{name}/w", (width,)))
    tf.get_variable(f"{name}/b", initializer=np.float32(bias))


def make_adam(scope: str) -> None:
    """The optimizer's own variables; nothing is ever trained."""
    parameters = [v for v in tf.trainable_variables() if v.op.name.startswith(scope) and "/ln_f/" in v.op.name]
    loss = tf.add_n([tf.reduce_sum(v) for v in parameters])
    with tf.name_scope("opt"):
        tf.train.AdamOptimizer(epsilon=1e-5, name="adam").minimize(loss, var_list=parameters)


def save(path: Path, step: int | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        saver = tf.train.Saver(max_to_keep=20, save_relative_paths=True)
        saver.save(session, str(path), global_step=step, write_meta_graph=False)


def main() -> None:
    for folder, sizes in SIZES.items():
        path = CHECKPOINTS / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "hparams.json").write_text(json.dumps(sizes, indent=2) + "\n")
        if folder != "gpt2":
            dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop", "head_pdrop"), 0.1)
            (path / "hparams.json").write_text(json.dumps({**sizes, **dropouts}, indent=2) + "\n")
            (path / "encoding").write_text('"main"')
    (CHECKPOINTS / "gpt2" / "encoder.json").write_text(json.dumps(encoder()))
    (CHECKPOINTS / "gpt2" / "vocab.bpe").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    settings = {
        "run": {"seed": 1, "log_interval": 10, "save_interval": 50, "save_dir": "run"},
        "task": {"query_length": 4, "response_length": 4, "policy": {"temperature": 0.7, "initial_model": "124M"}},
        "labels": {"type": "best_of_4", "num_train": 4992, "source": "labels.json"},
        "batch_size": 32,
        "lr": 5e-5,
        "rollout_batch_size": 512,
        "normalize_samples": 256,
        "debug_normalize": 0,
        "normalize_before": True,
        "normalize_after": True,
    }
    (CHECKPOINTS / "run" / "train_reward_hparams.json").write_text(json.dumps(settings, indent=2) + "\n")

    with tf.Graph().as_default():
        make_model("model", SIZES["gpt2"])
        save(CHECKPOINTS / "gpt2" / "model.ckpt", None)
    with tf.Graph().as_default():
        sizes = SIZES["run/reward_model"]
        make_model("ref_policy/model", sizes)
        make_model("reward_model/model", sizes)
        make_head("reward_model/model/heads/reward", sizes["n_embd"], HEAD_BIAS)
        tf.get_variable("reward_model/reward_norm/gain", initializer=np.float32(GAIN))
        tf.get_variable("reward_model/reward_norm/bias", initializer=np.float32(BIAS))
        tf.train.create_global_step()
        make_adam("reward_model/model")
        save(CHECKPOINTS / "run" / "reward_model" / "checkpoints" / "model.ckpt", None)
    with tf.Graph().as_default():
        sizes = SIZES["run/policy"]
        make_model("policy/model", sizes)
        make_head("policy/model/heads/value", sizes["n_embd"], 0.25)
        make_model("ref_policy/model", sizes)
        tf.train.create_global_step()
        make_adam("policy/model")
        save(CHECKPOINTS / "run" / "policy" / "checkpoints" / "model.ckpt", 7)


if __name__ == "__main__":
    tf.disable_eager_execution()
    main()
