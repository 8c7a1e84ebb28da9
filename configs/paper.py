r"""The paper's settings: J = 8, AdamW 5e-4 to 1e-5 cosine with 5 % warm-up, about 64 dialogues a step, greedy answers.

    python train.py distill --config configs/paper.py --prompts HuggingFaceH4/ultrachat_200k:train_sft --out answers/ \
        --set target=Qwen/Qwen3-4B
    python train.py fit --config configs/paper.py --data answers/ --run runs/paper --set target=Qwen/Qwen3-4B

Cost: 14,000 steps, two epochs of the paper's 460K dialogues, a matter of accelerators. The command reads `train_sft`
alone, less than half of them: halve the steps for two epochs of it. Reading from the Hub needs `pip install datasets`.
Expected (paper, Table 4): kappa 1.81 at k = 8 for Qwen3-4B.
"""

from specformer_jax.config import DraftConfig
from specformer_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(draft=DraftConfig(max_draft_length=8), steps=14_000)
