"""What schemathesis is told about this API: SCHEMATHESIS_HOOKS names this module.

Made-up model names would be answered by 404s and nothing else, so most bodies lose them; and fields that are null are
dropped now and then, so that bodies get past the check of the one before.
"""

import schemathesis


@schemathesis.hook
def map_body(context, body):
    if not isinstance(body, dict):
        return body
    rare = {"chat_template_kwargs", "structured_outputs", "response_format", "logit_bias", "tools", "tool_choice"}
    kept = {name: value for name, value in body.items() if value is not None and name not in rare}
    # A body of many odd fields is refused for the first: every other one goes without the rare.
    body = kept if len(body) % 2 else body
    return {name: value for name, value in body.items() if name != "model"}
