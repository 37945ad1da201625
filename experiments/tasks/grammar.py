"""Sentences of a small grammar of English, with their dependency trees.

    S -> NP (adverb) verb NP .        NP -> determiner adjective* noun (preposition NP)

so the distance of a word to its head varies: determiners hang on their noun, as do adjectives and prepositions, nouns on the verb or the preposition.
"""

from typing import NamedTuple

import numpy as np

RELATIONS = ("determiner", "adjective", "subject", "object", "preposition", "prepositional object", "adverb")
_WORDS = {
    "determiner": "the a this that every some our".split(),
    "adjective": "old young small red tall quiet strange happy dark hungry".split(),
    "noun": "dog cat man woman child teacher bird house garden river king student letter neighbour squirrel painter".split(),
    "verb": "saw liked followed chased found painted watched carried admired forgot".split(),
    "preposition": "in near with under behind on".split(),
    "adverb": "quickly often never slowly always".split(),
}


class Sentence(NamedTuple):
    """Words with, for each, the index of its head (-1: none, it is the root or the full stop) and of the relation among :data:`RELATIONS` (-1: none)."""

    words: list[str]
    heads: list[int]
    relations: list[int]


def sentences(seed: int, count: int) -> list[Sentence]:
    """Sentences drawn at random."""
    rng = np.random.default_rng(seed)
    return [_sentence(rng) for _ in range(count)]


def _sentence(rng):
    out = Sentence([], [], [])

    def put(kind, relation=None):
        out.words.append(str(rng.choice(_WORDS[kind])))
        out.heads.append(-1)
        out.relations.append(-1 if relation is None else RELATIONS.index(relation))
        return len(out.words) - 1

    def phrase(relation, phrases):
        """Adds a noun phrase and returns its noun, whose head the caller sets."""
        before = [put("determiner", "determiner"), *(put("adjective", "adjective") for _ in range(rng.integers(0, 3)))]
        noun = put("noun", relation)
        if rng.random() < phrases:
            link = put("preposition", "preposition")
            out.heads[link] = noun
            out.heads[phrase("prepositional object", phrases / 3)] = link
        for word in before:
            out.heads[word] = noun
        return noun

    subject = phrase("subject", 0.5)
    adverb = put("adverb", "adverb") if rng.random() < 0.4 else None
    verb = put("verb")
    thing = phrase("object", 0.5)
    for word in (subject, thing, *(() if adverb is None else (adverb,))):
        out.heads[word] = verb
    out.words.append(".")
    out.heads.append(-1)
    out.relations.append(-1)
    return out
