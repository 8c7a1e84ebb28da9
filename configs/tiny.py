"""A few steps to see every part work, seconds on a laptop:

    python train.py fit --config configs/tiny.py --data answers/ --run runs/tiny

Expected: nothing but a falling loss.
"""

from specformer_jax.config import DraftConfig
from specformer_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        draft=DraftConfig(max_draft_length=3, next_token_hook=True, draft_vocab_size=1024),
        sequence_length=256,
        batch_rows=2,
        anchors=160,
        steps=10,
        optimizer="muon",
        learning_rate=0.01,
        adam_learning_rate=0.001,
        soft=0.9,
        checkpoint_every=5,
        log_every=1,
    )
