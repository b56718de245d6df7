"""Drop reasons: the one vocabulary of refused rows, over all stages."""

from enum import StrEnum


class Reason(StrEnum):
    """Why a row was refused. The value is what stands in ``rejects-*.parquet`` and in manifests."""

    # select, in the order in which the rules are asked; see preprocessing/filters.py
    PUNSAFE_MISSING = "punsafe_missing"  # null or NaN: a missing score is a refusal
    PUNSAFE_HIGH = "punsafe_high"
    PWATERMARK_MISSING = "pwatermark_missing"
    PWATERMARK_HIGH = "pwatermark_high"
    SIMILARITY_LOW = "similarity_low"  # or missing, where a limit is set
    AESTHETIC_LOW = "aesthetic_low"  # or missing, where a limit is set
    SIDE_SMALL = "side_small"  # by the metadata; or missing
    ASPECT_EXTREME = "aspect_extreme"
    NO_URL = "no_url"
    TEXT_INVALID = "text_invalid"  # URL or caption is not UTF-8
    LANGUAGE_REFUSED = "language_refused"  # or missing, where languages are named
    CAPTION_EMPTY = "caption_empty"
    CAPTION_LONG = "caption_long"
    CAPTION_BOILERPLATE = "caption_boilerplate"  # a stock phrase, a file name, no letter at all
    URL_BLOCKED = "url_blocked"
    HOST_BLOCKED = "host_blocked"
    HASH_BLOCKED = "hash_blocked"
    NOT_SAMPLED = "not_sampled"  # by the hash of its uid
    DUPLICATE_ROW = "duplicate_row"  # the same url and caption as another row
    DUPLICATE_URL = "duplicate_url"  # the same url as another row, another caption
    HOST_FULL = "host_full"  # select.max_rows_per_host
    OVER_LIMIT = "over_limit"  # select.max_rows
    # download
    URL_REFUSED = "url_refused"  # scheme, port, or an address that is not public and not allowed; redirects included
    HOST_UNKNOWN = "host_unknown"  # the name does not resolve
    CONNECTION_FAILED = "connection_failed"
    TLS_FAILED = "tls_failed"  # no handshake, or a certificate that is not that host's
    TIMED_OUT = "timed_out"  # silence, too slow, or too long in all
    HTTP_CLIENT_ERROR = "http_client_error"  # 4xx, but for those of the next line and 429
    HTTP_NOT_NOW = "http_not_now"  # 408 Request Timeout, 421 Misdirected Request, 423 Locked, 425 Too Early
    HTTP_SERVER_ERROR = "http_server_error"  # 5xx
    RATE_LIMITED = "rate_limited"  # 429, or a pause asked for that is too long
    BAD_RESPONSE = "bad_response"  # not HTTP, over a limit on headers, a content coding that was not asked for
    TOO_MANY_REDIRECTS = "too_many_redirects"
    BODY_TOO_LARGE = "body_too_large"
    OPTED_OUT = "opted_out"  # X-Robots-Tag, TDM-Reservation, Content-Usage: see preprocessing/download/opt_out.py
    ROBOTS_DISALLOWED = "robots_disallowed"  # by the host's robots.txt
    HASH_MISMATCH = "hash_mismatch"  # not the bytes that the metadata speaks of
    EMPTY_FILE = "empty_file"
    NOT_AN_IMAGE = "not_an_image"  # HTML and the like
    IMAGE_TRUNCATED = "image_truncated"
    IMAGE_TOO_LARGE = "image_too_large"  # in pixels, by its header, before decoding
    IMAGE_TOO_SMALL = "image_too_small"
    IMAGE_BROKEN = "image_broken"  # the decoder gave up for another reason
    DECODER_DIED = "decoder_died"  # the process that decoded it was killed, and so was the next one
    DECODE_TIMED_OUT = "decode_timed_out"
    DECODE_OUT_OF_MEMORY = "decode_out_of_memory"
    LOST_BY_DOWNLOADER = "lost_by_downloader"  # the engine said nothing about the row
    DOWNLOAD_FAILED = "download_failed"  # none of the above: a fault of ours
    # encode
    DUPLICATE_IMAGE = "duplicate_image"  # the same bytes as another row's picture
    IMAGE_UNREADABLE = "image_unreadable"
    NON_FINITE = "non_finite"  # NaN or infinity out of an encoder
    # every stage
    FORGOTTEN = "forgotten"  # a tombstone names it: see preprocessing/contracts/tombstones.py; never asked for again
