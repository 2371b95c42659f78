"""A pytest plugin for llama.cpp's server tests: no models are fetched before them, and routes have their full names.

llama-server answers under `/chat/completions` what OpenAI has under `/v1/chat/completions`; only the second is served here.
"""


from pytest_report import pytest_collectreport, pytest_runtest_makereport

__all__ = ["pytest_collectreport", "pytest_runtest_makereport"]
SHORT = ("/chat/completions", "/completions", "/models", "/embeddings", "/responses")


def pytest_sessionstart(session):
    import utils

    utils.ServerPreset.load_all = staticmethod(lambda: None)
    whole = utils.ServerProcess.make_url

    def make_url(self, path, host=None):
        return whole(self, f"/v1{path}" if path.startswith(SHORT) else path, host)

    utils.ServerProcess.make_url = make_url
