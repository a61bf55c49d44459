"""Train a GPT as train.py does, with a part of each batch from the model's own episodes."""

import torch
from torch.nn.utils import clip_grad_norm_

from data.loader import Batch, train_batches, val_batches
from eval.loss import Loss, evaluate
from eval.rollout.policy import GPTPredictor
from eval.rollout.tasks.task import OracleTask
from model import GPT, IGNORE, eval_mode
from optim.schedule import lr_scale
from studies.dagger.episodes import labelled_episodes
from studies.sweep.optimizers import step
from trainer.build import SCHEDULE_KEYS, chosen, make_model, make_optimizers, make_preconditioner
from trainer.settings import TrainConfig

ROUNDS = 4  # of equal length; after each but the last, the model's own episodes are added


class OwnEpisodes:
    """The labelled episodes of the model in all rounds so far.

    Args:
        seed: of the order in which they are drawn.
    """

    def __init__(self, task: OracleTask, seed: int) -> None:
        self.task = task
        self.generator = torch.Generator().manual_seed(seed)
        self.x = self.y = torch.empty(0, task.context_tokens, dtype=torch.int64)  # (n, T) each

    def collect(self, model: GPT, n: int, number: int) -> None:
        """Add n episodes of the model, after the round with this number."""
        with eval_mode(model):
            stream = f"train, round {number}"
            x, y = labelled_episodes(self.task, GPTPredictor(model), n, stream)
        self.x, self.y = torch.cat([self.x, x]), torch.cat([self.y, y])

    def mix(self, batch: Batch, n: int) -> Batch:
        """Replace the first n sequences of a batch by own ones, if there are any yet."""
        if not len(self.x):
            return batch
        (x, y), rows = batch, torch.randint(len(self.x), (n,), generator=self.generator)
        return torch.cat([self.x[rows], x[n:]]), torch.cat([self.y[rows], y[n:]])

    def label_share(self) -> float:
        """Return the share of all decisions that have a label."""
        return int((self.y != IGNORE).sum()) / max(1, len(self.y) * self.task.horizon)


def train(config: TrainConfig, own: OwnEpisodes, n_own: int, n_episodes: int) -> GPT | None:
    """Return the trained model; None if a loss or gradient was not finite.

    The weights at the start and the order of the documents are those of train.py with these
    settings, which ask for one process, an optimizer of optim.build.OPTIMIZERS, and neither
    accumulation nor dropout nor an average of the weights.

    Args:
        own: gets the episodes of the model.
        n_own: sequences of each batch after the first round that are the model's own.
        n_episodes: episodes that the model adds after each round but the last.
    """
    dataset = own.task.open()
    model = make_model(config, dataset.tokenizer.n_vocab)
    optimizers = make_optimizers(config, model, None)
    if config.dopr:
        make_preconditioner(config, model).attach(*optimizers)
    sizes = {"batch_size": config.batch_size, "micro_batch_size": config.batch_size}
    batches = train_batches(dataset, block_size=config.block_size, seed=config.seed, **sizes)
    ends = rounds_of(config.max_steps)
    for i in range(config.max_steps):
        if i in ends:
            own.collect(model, n_episodes, ends[i])
        [batch] = next(batches)
        x, y = own.mix(batch, n_own)  # (B, T) each
        _, nats = model(x, y, reduction="sum", return_logits=False)
        loss = nats / max(1, int((y != IGNORE).sum()))
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), config.grad_clip)
        if not (loss + norm).isfinite():
            return None
        step(optimizers, lr_scale(i, **chosen(config, SCHEDULE_KEYS)))
    return model


def rounds_of(steps: int) -> dict[int, int]:
    """Return {number of steps: number of the round that ends there}, without the last round."""
    return {i * steps // ROUNDS: i for i in range(1, ROUNDS)}


def validation_loss(config: TrainConfig, task: OracleTask, model: GPT) -> float:
    """Return the validation loss of train.py, in nats per decision."""
    dataset, size = task.open(), config.batch_size
    sizes = {"batch_size": size, "block_size": config.block_size}
    batches = val_batches(dataset, limit=config.eval_batches * size, **sizes)
    found = evaluate(model, batches, dataset.tokenizer.token_bytes(), device="cpu")
    assert isinstance(found, Loss)  # it was not asked to stop
    return found.loss
