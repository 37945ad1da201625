"""What the tasks of assignments, blocks of letters, and prose or code say is so."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks import assignments, docstrings, find_block


def test_assignments():
    """The answer is the value last assigned; stale are assignments that another follows."""
    batch = assignments.sampler(20, 8)(jax.random.key(0))
    for tokens, answers, stale, live in zip(*map(np.asarray, batch)):
        events, known = tokens.reshape(-1, 3), {}
        for index, (kind, variable, third) in enumerate(events):
            if kind == assignments.SET:
                known[variable] = index
                assert answers[index] == -1
            else:
                assert kind == assignments.ASK and third == assignments.BLANK and answers[index] == events[known[variable], 2]
        assert (np.flatnonzero(live) == sorted(known.values())).all() and (stale | live).sum() == (events[:, 0] == assignments.SET).sum()
    logits = jnp.zeros((8, 60, assignments.VOCABULARY)).at[:, 1::3].set(50.0 * jax.nn.one_hot(batch.answers, assignments.VOCABULARY))
    assert assignments.accuracy(logits, batch) == 1 and assignments.loss(logits, batch) < 1e-6 and (batch.answers >= 0).sum() > 20


def test_find_block():
    """The answer is a block, with both letters, and no other has both."""
    for tokens in np.asarray(find_block.sampler(12, 64)(jax.random.key(0))):
        blocks, query, answer = tokens[:60].reshape(12, 5), tokens[60:62], tokens[62:]
        assert (blocks[:-1, 4] == find_block.SEPARATOR).all() and blocks[-1, 4] == find_block.ASK
        assert all(len(set(block[:4])) == 4 for block in blocks)
        assert [list(block[:4]) for block in blocks if set(query) <= set(block[:4])] == [list(answer)]


def test_docstrings():
    """As much prose as code, of other files in the two parts."""
    train, held = docstrings.split()
    for windows, labels in (train, held):
        assert len(windows) > 300 and windows.shape[1] == docstrings.LENGTH and labels.mean() == 0.5
    shared = {bytes(row.astype(np.uint8)) for row in train[0]} & {bytes(row.astype(np.uint8)) for row in held[0]}
    assert len(shared) < 0.05 * len(held[0])
