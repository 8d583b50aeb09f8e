"""The turns of one agent as a tree, whose branches are conversations.

A request that repeats a conversation word for word and goes on continues its token ids. One that does so where another
request went on already, as parallel calls do, is a branch; one that repeats none begins a conversation of its own: a
sub-conversation, or one whose earlier messages the agent has changed.
"""

from dataclasses import dataclass

from distill_workers.engine.request import Response
from distill_workers.environments.protocol import Message
from distill_workers.rollout.conversations.episodes import Conversation
from distill_workers.rollout.scheduler import EngineAffinity


@dataclass(frozen=True, slots=True)
class Opening:
    """What a conversation begins with, as token ids."""

    prompt_ids: list[int]
    privileged_ids: list[int] | None
    """What the teacher is given in their place; None where it is given the same."""


@dataclass(slots=True, eq=False)
class RecordedTurn:
    """A turn of the student, at the end of its conversation so far."""

    messages: list[Message]
    """Of the whole conversation, the student's own of this turn at last."""
    tools: str
    """The tools of its request, as JSON."""
    opening: Opening
    parent: "RecordedTurn | None"
    read_ids: list[int]
    """What stands between the turn of `parent` and this one."""
    response: Response
    affinity: EngineAffinity
    truncated: bool
    """Whether the conversation had no room for more of it, or for what the agent would have gone on with."""

    @property
    def path(self) -> "list[RecordedTurn]":
        """Return the turns of the conversation, the first at first."""
        found, turn = [self], self.parent
        while turn is not None:
            found.append(turn)
            turn = turn.parent
        return found[::-1]

    @property
    def ids(self) -> list[int]:
        """Return the ids after the opening."""
        return [i for turn in self.path for i in (*turn.read_ids, *turn.response.ids)]


class ConversationTree:
    """All turns of one episode of an agent."""

    def __init__(self) -> None:
        self._turns: list[RecordedTurn] = []

    def add(self, turn: RecordedTurn) -> None:
        """Record a turn."""
        self._turns.append(turn)

    def repeated(self, messages: list[Message], tools: str) -> RecordedTurn | None:
        """Return the end of the longest conversation that the messages repeat and go on from; None without one."""
        found = [
            turn
            for turn in self._turns
            if turn.tools == tools
            and len(turn.messages) < len(messages)
            and turn.messages == messages[: len(turn.messages)]
        ]
        return max(found, key=lambda turn: len(turn.messages), default=None)

    def is_rewritten(self, messages: list[Message], repeated: RecordedTurn | None) -> bool:
        """Return whether the messages have another turn of the assistant where a conversation has the student's."""
        begin = len(repeated.messages) if repeated is not None else 0
        places = {len(turn.messages) - 1 for turn in self._turns}
        return any(m["role"] == "assistant" and begin <= i and i in places for i, m in enumerate(messages))

    def conversations(self) -> list[Conversation]:
        """Return every conversation that none goes on from, in an order that no timing of parallel calls changes.

        A turn that several of them have is trained in the first alone: one that is not truncated, if there is one,
        since rollout.truncated may drop the others.
        """
        parents = {id(turn.parent) for turn in self._turns}
        ends = [turn for turn in self._turns if id(turn) not in parents]
        trained = set[int]()
        found = []
        for end in sorted(ends, key=lambda turn: (turn.truncated, turn.opening.prompt_ids, turn.ids)):
            conversation = Conversation(end.opening.prompt_ids, end.opening.privileged_ids, truncated=end.truncated)
            for turn in end.path:
                conversation.add_turn(turn.read_ids, turn.response, is_trained=id(turn) not in trained)
                trained.add(id(turn))
            found.append(conversation)
        return found
