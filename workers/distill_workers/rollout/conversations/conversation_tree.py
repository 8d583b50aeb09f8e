"""The turns of one agent as a tree, whose branches are conversations.

A request that repeats a conversation word for word and goes on continues its token ids. One that does so where another
request went on already, as parallel calls do, is a branch; one that repeats none begins a conversation of its own: a
sub-conversation, or one whose earlier messages the agent has changed. What agents write otherwise in an assistant's
message without another meaning (`as_compared`) changes nothing.
"""

from dataclasses import dataclass

from distill_workers.engine.request import Response
from distill_workers.environments.protocol import Message
from distill_workers.environments.tool_calls import plain_message
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
    """Of the whole conversation, the student's own of this turn at last, as_compared."""
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


def as_compared(messages: list[Message]) -> list[Message]:
    """Return messages without what agents write otherwise in those of an assistant: a name, the thinking, which some
    put back before the text, and white space around the text."""
    return [
        {**{field: m[field] for field in m if field != "name"}, "content": plain_message(m["content"]).content}
        if m["role"] == "assistant"
        else m
        for m in messages
    ]


class ConversationTree:
    """All turns of one episode of an agent."""

    def __init__(self) -> None:
        self._turns: list[RecordedTurn] = []

    def add(self, turn: RecordedTurn) -> None:
        """Record a turn."""
        self._turns.append(turn)

    def repeated(self, messages: list[Message], tools: str) -> RecordedTurn | None:
        """Return the end of the longest conversation that the messages, as_compared, repeat and go on from; None
        without one. Of several that say the same it is chosen by their ids, so by no timing of parallel calls."""
        found = [turn for turn in self._repeated(messages) if turn.tools == tools]
        longest = max((len(turn.messages) for turn in found), default=0)
        return max((turn for turn in found if len(turn.messages) == longest), key=lambda turn: turn.ids, default=None)

    def is_rewritten(self, messages: list[Message]) -> bool:
        """Return whether the messages, as_compared, say otherwise what the student said, or what came before it.

        After the longest conversation that they repeat, with whatever tools, they then have an assistant's message in
        the place of a turn, and either that is the student's and what stands before is not, or the reverse.
        """
        repeated = max((len(turn.messages) for turn in self._repeated(messages)), default=0)
        for turn in self._turns:
            place = len(turn.messages) - 1
            if repeated <= place < len(messages) and messages[place]["role"] == "assistant":
                is_same, is_after_same = messages[place] == turn.messages[place], messages[:place] == turn.messages[:-1]
                if is_same != is_after_same:
                    return True
        return False

    def _repeated(self, messages: list[Message]) -> list[RecordedTurn]:
        """Return the ends of all conversations that the messages repeat and go on from."""
        return [
            turn
            for turn in self._turns
            if len(turn.messages) < len(messages) and turn.messages == messages[: len(turn.messages)]
        ]

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
