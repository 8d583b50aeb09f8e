"""Which scoring protocol a teacher's servers are asked by."""

from distill_api.spec.job_spec import Protocol, TeacherSource
from distill_workers.teacher.openai_protocol import OpenAIProtocol
from distill_workers.teacher.protocol import ScoringProtocol
from distill_workers.teacher.sglang_protocol import SGLangProtocol, VersionedSGLangProtocol


def scoring_protocol(teacher: TeacherSource) -> ScoringProtocol:
    """Return the protocol of a source: that of its endpoint, or of the servers of this project's image."""
    endpoint = teacher.endpoint
    if teacher.student is not None:
        return VersionedSGLangProtocol()
    if endpoint is None:
        return SGLangProtocol()
    if endpoint.protocol is Protocol.OPENAI:
        assert endpoint.model is not None, "Endpoint requires a model for this protocol"
        return OpenAIProtocol(endpoint.model, endpoint.vocabulary_size)
    return SGLangProtocol(ours=False, vocabulary=endpoint.vocabulary_size)
