"""Roll a model out and label its decisions with the oracle's.

The decisions in a task's documents are drawn from the oracle, so the labels are drawn from it, too:
they are as noisy as the targets of cloning. The model's decision and its label use the same uniform
random number. A model that equals the oracle therefore adds documents like those of the dataset,
in which every target is the next input.
"""

import torch
from torch import Tensor

from eval.rollout.environment import Environment, draw, rollout
from eval.rollout.policy import Predictor
from eval.rollout.tasks.nav import NavEnvironment
from eval.rollout.tasks.task import OracleTask
from model import IGNORE

Rows = tuple[Tensor, Tensor]  # inputs and targets, (n, context_tokens) int64 each


def labelled_episodes(task: OracleTask, predictor: Predictor, n: int, stream: str) -> Rows:
    """Return n episodes of a model with the oracle's labels.

    Args:
        stream: selects the episodes, see OracleTask. Names that begin with "train" have the starts
            of the training documents.
    """
    uniforms = task.uniforms(n, stream)  # (n, horizon)
    episodes = task.environment(n, stream)
    own = rollout(episodes, predictor, uniforms, "model", task.context_tokens)
    return label(task.environment(n, stream), own.tokens, uniforms)


def label(environment: Environment, decisions: Tensor, uniforms: Tensor) -> Rows:
    """Replay decisions, and label each with a draw of the oracle in the same state.

    The inputs are prompts, decisions and answers. Where there is no label, the target is IGNORE.

    Args:
        environment: the n episodes at their beginning.
        decisions: (n, horizon) int64.
        uniforms: (n, horizon) float64 in [0, 1), to draw the labels with.
    """
    tokens = [environment.prompts]
    targets = [torch.full_like(environment.prompts, IGNORE)]
    answer = tokens[0][:, :0]
    for token, u in zip(decisions.unbind(1), uniforms.unbind(1), strict=True):
        wanted = draw(environment.oracle(), u).masked_fill(~has_label(environment), IGNORE)
        answer = environment.step(token)
        tokens += [token[:, None], answer]
        targets += [wanted[:, None], torch.full_like(answer, IGNORE)]
    document_tokens = sum(part.size(1) for part in tokens) - answer.size(1)
    x, y = torch.cat(tokens, dim=1), torch.cat(targets, dim=1)
    return x[:, : document_tokens - 1], y[:, 1:document_tokens]


def has_label(environment: Environment) -> Tensor:  # (n,) bool
    """Return where the oracle labels: not after the end of an episode.

    Nor does it at the pairs of node and goal that `nav` holds out from training. A wrong move may
    lead to one, but models are graded on paths that begin there and that they have never seen.
    """
    is_running = ~environment.has_ended()
    if isinstance(environment, NavEnvironment):
        return is_running & ~environment.held_out[environment.place, environment.goal]
    return is_running
