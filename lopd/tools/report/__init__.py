"""Pages for any browser: a whole run (`run`), and its tokens (`tokens`)."""

from lopd.records.optional import needing as _needing

with _needing("jinja2", __name__):
    from lopd.tools.report.history import Phase as Phase
    from lopd.tools.report.history import RunHistory as RunHistory
    from lopd.tools.report.run import write_run_report as write_run_report
    from lopd.tools.report.tokens import TokenReport as TokenReport
    from lopd.tools.report.tokens import decoder_of as decoder_of
    from lopd.tools.report.tokens import write_token_report as write_token_report
