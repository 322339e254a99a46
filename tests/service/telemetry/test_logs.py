"""Lines of the log."""

import json
import logging

from service.telemetry.logs import JSONFormatter


def test_the_time_of_a_json_line_has_milliseconds() -> None:
    record = logging.makeLogRecord({"msg": "hello"})
    record.created, record.msecs = 1_700_000_000.0075, 7.5
    assert json.loads(JSONFormatter().format(record))["time"] == "2023-11-14T22:13:20.007Z"
