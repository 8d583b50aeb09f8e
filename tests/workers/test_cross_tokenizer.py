"""A student's response as the tokens of a teacher with another tokenizer, and its scores brought back."""

import random
from typing import Any

import pytest
from cross_tokenizers import CHATML, byte_level, normalizing, sentence_piece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from distill_api.spec.data import Data
from distill_api.spec.job_spec import Spec
from distill_workers.failures import ConfigurationError
from distill_workers.teacher.cross_tokenizer.alignment import Span, align
from distill_workers.teacher.cross_tokenizer.token_bytes import NotReproduced, TokenBytes
from distill_workers.teacher.cross_tokenizer.translation import Translation, Translator
from distill_workers.teacher.cross_tokenizer.translators import translators
from distill_workers.teacher.cross_tokenizer.turn import Turn, turn_of
from distill_workers.teacher.protocol import BadScore, Scores

TOKENIZERS = {
    "byte-level": byte_level(),
    "other byte-level": byte_level(400, text="the answer of the believers is unbelievable, what cats! 42 12"),
    "SentencePiece": sentence_piece(),
    "SentencePiece, first": sentence_piece(first=True),
}
BYTES = {name: TokenBytes(tokenizer) for name, tokenizer in TOKENIZERS.items()}
TEXTS = st.text(
    st.one_of(st.sampled_from("the answer is 42. \n\t"), st.characters(exclude_categories=["Cs"])), max_size=40
)
every = pytest.mark.parametrize("name", TOKENIZERS)
pairs = pytest.mark.parametrize(("student", "teacher"), [(s, t) for s in TOKENIZERS for t in TOKENIZERS])


def translator(student: str, teacher: str, **leads: str) -> Translator:
    own, theirs = TOKENIZERS[student], TOKENIZERS[teacher]
    return Translator(BYTES[student], BYTES[teacher], {own.eos_token_id}, theirs.eos_token_id, **leads)


def written(name: str, text: str) -> list[int]:
    return BYTES[name].encode(text)


def ended(name: str, text: str) -> list[int]:
    return [*written(name, text), TOKENIZERS[name].eos_token_id]


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_spans_are_the_finest_runs_that_cover_the_same_text(widths: list[int], chance: random.Random) -> None:
    total = sum(widths)
    other = sorted({*chance.sample(range(1, total + 1), chance.randint(1, total)), total})
    mine = [sum(widths[: place + 1]) for place in range(len(widths))]
    spans = align(mine, other)
    assert (sum(s.student for s in spans), sum(s.teacher for s in spans)) == (len(mine), len(other))
    assert all(s.student >= 1 and s.teacher >= 1 for s in spans)
    ends = [mine[sum(s.student for s in spans[: place + 1]) - 1] for place in range(len(spans))]
    assert ends == sorted(set(mine) & set(other))


def test_a_token_without_text_belongs_to_the_span_before_it_and_the_first_to_the_next() -> None:
    assert align([0, 2, 2, 3], [2, 3]) == [Span(3, 1), Span(1, 1)]
    assert align([0, 2], [0, 2]) == [Span(1, 1), Span(1, 1)]


def test_no_span_ends_within_a_character_and_what_follows_the_last_end_in_common_is_in_none() -> None:
    assert align([None, 3, 5], [1, 3, 4]) == [Span(2, 2)]


@every
@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_the_tokens_of_a_text_are_its_bytes_and_add_nothing_at_its_beginning(name: str, text: str) -> None:
    # SentencePiece has one sign for a space and for itself.
    if "\u2581" not in text or name.endswith("byte-level"):
        assert BYTES[name].joined(written(name, text)) == text.encode()


@pairs
@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 10_000), min_size=1, max_size=12))
def test_the_spans_of_any_row_of_tokens_are_the_same_bytes_on_both_sides(
    student: str, teacher: str, ids: list[int]
) -> None:
    own, theirs = BYTES[student], BYTES[teacher]
    end = TOKENIZERS[student].eos_token_id
    ids = [*(i % len(own) for i in ids if not own.is_special(i % len(own))), end]
    if "\u2581" in own.joined(ids).decode(errors="replace"):
        return
    found = translator(student, teacher).translate(ids)
    assert found.spans is not None and found.unscored == 0
    at = [0, 0]
    for span in found.spans:
        mine, other = ids[at[0] : at[0] + span.student], found.ids[at[1] : at[1] + span.teacher]
        at = [at[0] + span.student, at[1] + span.teacher]
        mine, other = [i for i in mine if i != end], [i for i in other if i != TOKENIZERS[teacher].eos_token_id]
        assert own.joined(mine).decode(errors="replace") == theirs.joined(other).decode()
    assert at == [len(ids), len(found.ids)]


@pairs
def test_the_end_of_a_turn_is_the_end_of_a_turn(student: str, teacher: str) -> None:
    found = translator(student, teacher).translate(ended(student, "the answer is 42."))
    assert found.ids == ended(teacher, "the answer is 42.")
    assert found.spans is not None and found.spans[-1] == Span(1, 1)


@every
def test_to_its_own_tokenizer_each_token_is_a_span(name: str) -> None:
    ids = ended(name, "unbelievable cats \u4f60\u597d")
    found = translator(name, name).translate(ids)
    assert found.ids == ids
    assert found.spans is not None and found.unscored == 0
    # A character of several bytes is one span, of as many tokens as it has.
    assert [s.student for s in found.spans] == [s.teacher for s in found.spans]
    assert translator(name, name).translate(ended(name, "the cats")).spans == [Span(1, 1)] * len(
        ended(name, "the cats")
    )


def test_a_special_token_is_the_teachers_of_the_same_name_and_else_the_text_that_it_is_written_as() -> None:
    own = byte_level(special=("<|im_start|>", "<|tool|>", "<|im_end|>"))
    student, teacher = TokenBytes(own), BYTES["byte-level"]
    start, tool, end = (own.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|tool|>", "<|im_end|>"))
    theirs = TOKENIZERS["byte-level"]
    found = Translator(student, teacher, {end}, theirs.eos_token_id).translate([start, *student.encode("a"), tool, end])
    assert found.ids == [
        theirs.convert_tokens_to_ids("<|im_start|>"),
        *teacher.encode("a<|tool|>"),
        theirs.eos_token_id,
    ]
    assert found.spans is not None and found.spans[0] == Span(1, 1) and len(found.spans) == 4


def test_a_text_that_looks_like_a_special_token_of_the_teacher_stays_a_text() -> None:
    theirs = TOKENIZERS["byte-level"]
    found = translator("SentencePiece", "byte-level").translate(ended("SentencePiece", "a<|im_end|>b"))
    assert found.ids[:-1] == BYTES["byte-level"].encode("a<|im_end|>b")
    assert theirs.eos_token_id not in found.ids[:-1]


@pairs
def test_of_a_response_that_was_cut_off_the_last_span_is_not_scored(student: str, teacher: str) -> None:
    ids = written(student, "what is the answer")
    found, whole = (translator(student, teacher).translate(x) for x in (ids, [*ids, TOKENIZERS[student].eos_token_id]))
    assert found.spans is not None and whole.spans is not None
    assert found.spans == whole.spans[:-2]
    assert found.unscored == whole.spans[-2].student
    assert found.ids == whole.ids[: len(found.ids)]


@pairs
def test_the_rest_of_a_character_that_was_cut_in_two_is_not_scored(student: str, teacher: str) -> None:
    """U+2603 is three bytes, and a token of nobody."""
    ids = written(student, "the cats \u2603")
    assert len(ids) > len(written(student, "the cats ")) + 2
    for cut in (1, 2):
        found = translator(student, teacher).translate(ids[:-cut])
        assert found.spans is not None and found.unscored > 3 - cut
        scored = ids[: len(ids) - cut - found.unscored]
        assert "the cats".startswith(BYTES[student].joined(scored).decode()) and scored


@pairs
def test_bytes_that_are_no_character_are_what_a_reader_sees(student: str, teacher: str) -> None:
    snowman, end = written(student, " \u2603"), TOKENIZERS[student].eos_token_id
    found = translator(student, teacher).translate(
        [*written(student, "the"), *snowman[:-1], *written(student, " cat"), end]
    )
    assert BYTES[teacher].joined(found.ids[:-1]).decode() == "the \ufffd cat"
    assert found.spans is not None and found.unscored == 0
    cut_by_the_end = translator(student, teacher).translate([*written(student, "the"), *snowman[:-1], end])
    assert BYTES[teacher].joined(cut_by_the_end.ids[:-1]).decode() == "the \ufffd"


def test_a_response_of_a_part_of_a_character_alone_fails_its_sample() -> None:
    with pytest.raises(BadScore, match="empty: the response is a part of a character"):
        translator("byte-level", "SentencePiece").translate(written("byte-level", "\u2603")[:1])


def test_a_response_that_was_cut_off_and_is_one_span_is_scored_all_the_same() -> None:
    ids = written("byte-level", "a")
    assert translator("byte-level", "byte-level").translate(ids) == Translation(ids, [Span(1, 1)])


def test_an_id_that_is_no_token_fails_its_sample() -> None:
    with pytest.raises(BadScore, match="outside_vocabulary: token 9999 is none of the student's tokenizer"):
        translator("byte-level", "SentencePiece").translate([9999])


def test_the_log_prob_of_a_span_is_chained_and_shared_among_its_tokens() -> None:
    found = Translation([7, 8, 9], [Span(2, 1), Span(1, 2)], unscored=2)
    scores = found.of_student(Scores([-1.0, -0.5, -0.25], None, None))
    assert scores.logprobs[:3] == [-0.5, -0.5, -0.75]
    assert scores.span_ends == [False, True, True, False, False]
    assert scores.unscored == 2 and len(scores.logprobs) == 5


@pairs
def test_the_shares_of_a_response_add_up_to_the_chain_of_the_teacher(student: str, teacher: str) -> None:
    ids = ended(student, "unbelievable believers: \u4f60\u597d \U0001f600, 42!")
    found = translator(student, teacher).translate(ids)
    logprobs = [-random.Random(i).random() for i in range(len(found.ids))]
    scores = found.of_student(Scores(logprobs, None, None))
    assert len(scores.logprobs) == len(ids)
    assert sum(scores.logprobs) == pytest.approx(sum(logprobs), abs=1e-12)


def test_the_space_before_an_answer_is_the_templates_and_no_part_of_the_response() -> None:
    inst, chatml = TOKENIZERS["SentencePiece"], TOKENIZERS["byte-level"]
    assert turn_of(inst) == Turn(" ", inst.eos_token_id)
    assert turn_of(chatml) == Turn("", chatml.eos_token_id)
    there = translator("SentencePiece", "byte-level", student_lead=" ")
    found = there.translate(ended("SentencePiece", " the answer"))
    assert found.ids == ended("byte-level", "the answer") and found.unscored == 0
    back = translator("byte-level", "SentencePiece", teacher_lead=" ")
    found = back.translate(ended("byte-level", "the answer"))
    assert found.ids == ended("SentencePiece", " the answer")
    assert found.spans is not None and sum(s.teacher for s in found.spans) == len(found.ids)


def legacy() -> Any:
    """SentencePiece as Llama 2 and Mistral have it, whose prompts end by a special token: the answer behind it is a
    text of its own, before which the normalizer puts a space."""
    tokenizer = sentence_piece()
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


def test_a_space_that_arises_when_an_answer_is_tokenised_is_no_part_of_a_students_response() -> None:
    student = legacy()
    asked = student("<|assistant|>", add_special_tokens=False)["input_ids"]
    answered = student("<|assistant|>the answer</s>", add_special_tokens=False)["input_ids"]
    found = built(student, TOKENIZERS["byte-level"]).translate(answered[len(asked) :])
    assert found.ids == ended("byte-level", "the answer") and found.unscored == 0


def test_a_space_that_arises_when_an_answer_is_tokenised_is_given_to_a_teacher() -> None:
    teacher = legacy()
    answered = teacher("<|assistant|>the answer</s>", add_special_tokens=False)["input_ids"]
    found = built(TOKENIZERS["byte-level"], teacher).translate(ended("byte-level", "the answer"))
    assert found.ids == answered[1:]


def test_a_lead_that_cannot_be_told_from_the_prompts_tokens_is_that_of_the_template() -> None:
    inst = TOKENIZERS["SentencePiece"]

    class Merging:
        """Its last token of a prompt is another one where an answer follows."""

        def __getattr__(self, name: str) -> Any:
            return getattr(inst, name)

        def encode(self, text: str, **options: Any) -> list[int]:
            return [len(text), *inst.encode(text, **options)]

    assert turn_of(Merging(), BYTES["SentencePiece"]).lead == turn_of(inst, BYTES["SentencePiece"]).lead == " "


def test_a_template_without_an_answer_has_no_lead_and_no_end() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert turn_of(tokenizer) == Turn()


def spec(**teacher: Any) -> Spec:
    return Spec.model_validate(
        {
            "student": {"model": "/m/student"},
            "teacher": {"model": "/m/teacher", "tokenizer": "/m/teacher", **teacher},
            "data": {"prompts": {"path": "/d"}},
            "schedule": {"steps": 1},
        }
    )


def built(student: Any, teacher: Any) -> Translator:
    return translators(spec(), student, {student.eos_token_id}, {"teacher": teacher})["teacher"]


@pytest.mark.parametrize("how", [normalizers.Lowercase(), normalizers.NFKC(), normalizers.StripAccents()])
def test_a_tokenizer_that_normalises_is_refused_with_the_text(how: Any) -> None:
    if isinstance(how, normalizers.StripAccents):
        how = normalizers.Sequence([normalizers.NFD(), how])
    with pytest.raises(
        ConfigurationError, match=r"spec.teacher.tokenizer: it normalises or lacks a text .* are those of"
    ):
        built(TOKENIZERS["SentencePiece"], normalizing(how))


def test_composed_characters_are_kept_by_a_tokenizer_that_composes_and_others_fail_their_sample() -> None:
    """Qwen's tokenizers write NFC."""
    found = built(TOKENIZERS["SentencePiece"], normalizing(normalizers.NFC()))
    assert found.translate(ended("SentencePiece", "caf\u00e9")).unscored == 0
    with pytest.raises(BadScore, match="not_reproduced: the teacher's tokenizer changes the response"):
        found.translate(ended("SentencePiece", "cafe\u0301"))


def test_a_tokenizer_whose_tokens_have_no_bytes_of_their_own_is_refused() -> None:
    inner = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    pieces = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[UNK]")
    with pytest.raises(ConfigurationError, match=r"spec.student.model: .* its decoder WordPiece adds spaces"):
        built(pieces, byte_level())
    with pytest.raises(ConfigurationError, match=r"spec.teacher.tokenizer: .* \(no tokenizer.json\)"):
        built(byte_level(), type("Slow", (), {"chat_template": None, "eos_token_id": 1})())


def test_a_teacher_that_lacks_what_the_student_never_writes_is_taken_and_one_that_lacks_more_is_not() -> None:
    digits = Tokenizer(models.BPE({"<eos>": 0, "<unk>": 1, "4": 2, "2": 3, "42": 4}, [("4", "2")], unk_token="<unk>"))
    small = PreTrainedTokenizerFast(tokenizer_object=digits, eos_token="<eos>", unk_token="<unk>")
    found = built(small, byte_level())
    assert BYTES["byte-level"].joined(found.translate([4, 2, 0]).ids[:-1]) == b"424"
    with pytest.raises(ConfigurationError, match="it normalises or lacks a text"):
        built(byte_level(), small)


def test_a_teacher_that_ends_its_responses_by_no_token_is_refused() -> None:
    endless = byte_level()
    endless.eos_token, endless.chat_template = None, None
    with pytest.raises(ConfigurationError, match="names no token that ends a response"):
        built(byte_level(), endless)


def test_the_end_of_a_turn_is_that_of_the_template_where_prompts_are_conversations() -> None:
    base = byte_level(special=("<|im_end|>", "<|im_start|>", "<|endoftext|>"))
    base.chat_template = CHATML
    end = base.convert_tokens_to_ids("<|im_end|>")
    assert built(byte_level(), base).translate([byte_level().eos_token_id]).ids == [end]


def test_conversations_and_plain_texts_beside_a_tokenizer_of_the_teachers_end_the_job() -> None:
    sources = [{"name": n, "prompts": {"path": "/d", "applyChatTemplate": n == "chats"}} for n in ("chats", "texts")]
    mixed = spec().model_copy(update={"data": Data.model_validate({"sources": sources})})
    with pytest.raises(ConfigurationError, match="is true for data source chats and false for data source texts"):
        translators(mixed, TOKENIZERS["byte-level"], {1}, {"teacher": TOKENIZERS["SentencePiece"]})


def test_a_text_without_a_token_is_not_reproduced() -> None:
    inner = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(NotReproduced, match="the tokens of 'b' are those of '<unk>'"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")).encode("b")
