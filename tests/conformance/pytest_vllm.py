"""A pytest plugin for vLLM's tests: what they would do before they start a server is left out, or done on this machine.

They read the configuration of a model with vLLM's own loader and wait for the memory of a GPU. Neither says anything about
the server that is under test. Their pictures and videos are in a bucket; others of the same kinds stand in for them.
"""

import stand_ins
from pytest_report import pytest_collectreport, pytest_runtest_makereport

__all__ = ["pytest_collectreport", "pytest_runtest_makereport"]


class Flags:
    """Reads those flags of a server's that the tests look at themselves."""

    def subparser_init(self, subparsers):
        parser = subparsers.add_parser("serve")
        for name in ("--uds", "--host", "--port", "--show-hidden-metrics-for-version"):
            parser.add_argument(name)
        parser.add_argument("--shutdown-timeout", type=float, default=0)
        parser.parse_args = lambda words: parser.parse_known_args(words)[0]
        return parser


def pytest_collectstart(collector):
    try:
        from tests import utils
    except ImportError:
        return
    utils.RemoteOpenAIServer._create_cli_subcommand = lambda _: Flags()
    utils.RemoteVLLMServer._pre_download_model = lambda *_: None
    utils.RemoteVLLMServer._get_gpu_memory_used = lambda *_: None


def pytest_sessionstart(session):
    from vllm.assets import base

    # Before the modules of the tests copy it.
    base.VLLM_S3_BUCKET_URL = stand_ins.serve()
