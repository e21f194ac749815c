"""Tools: the calls in a dialogue's messages and the tools it was held with, however a file writes them."""

from __future__ import annotations

import json
from typing import Any

from baton.data.faults import BadRow, Unusable
from baton.data.files import describe


def read_calls(message: dict, role: str, content: Any, name: str) -> list[dict[str, Any]]:
    """A message's tool calls, [{type, function: {name, arguments}}] with the id where it has one; [] if it makes none.

    From `tool_calls` or the older `function_call` of OpenAI's format, or from the JSON that a ShareGPT message of the
    role function_call holds; where that is no call, it stays what the assistant says. Arguments that are a JSON string
    are read: templates write them as JSON, and a string would be quoted once more. Raises BadRow for what is no call,
    and Unusable for arguments that are no JSON object.
    """
    for key in ("tool_calls", "function_call"):
        if message.get(key) is not None:
            calls = _parsed(message[key])
            calls = calls if isinstance(calls, list) else [calls]
            return [_call(call, f"{name}.{key}[{index}]") for index, call in enumerate(calls)]
    if role != "function_call":
        return []
    calls = _parsed(content)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return []
    return [_call(call, name) for call in calls]


def read_tools(row: dict) -> list[dict[str, Any]]:
    """The row's `tools` (or `functions`), a list or the JSON of one, each as {type: function, function: {name, …}}.

    [] where the row has none. Raises BadRow for what is no list of tools.
    """
    key = next((key for key in ("tools", "functions") if row.get(key) not in (None, "", [])), None)
    if key is None:
        return []
    tools = _parsed(row[key])
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list):
        raise BadRow(f"has {describe(row[key])} as `{key}`; expected a list of tools, or the JSON of one")
    return [_tool(_parsed(tool), f"{key}[{index}]") for index, tool in enumerate(tools)]


def _tool(tool: Any, name: str) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"has {describe(tool)} as `{name}`; expected a tool, {{name, description, parameters}}")
    return {"type": "function", "function": function}


def _call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"has {describe(call)} as `{name}`; expected a call, {{function: {{name, arguments}}}}")
    given = function.get("arguments", function.get("parameters"))
    arguments = _parsed(given) if given not in (None, "") else {}
    if not isinstance(arguments, dict):
        raise Unusable("a tool call whose arguments are no JSON object")
    read = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **read} if isinstance(call.get("id"), str) and call["id"] else read


def _parsed(value: Any) -> Any:
    """The value that a JSON string stands for; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
