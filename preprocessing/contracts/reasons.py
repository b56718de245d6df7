"""Drop reasons: the one vocabulary of refused rows, over all stages."""

from enum import StrEnum


class Reason(StrEnum):
    """Why a row was refused. The value is what stands in ``rejects-*.parquet`` and in manifests."""

    # select
    NO_URL = "no_url"
    PUNSAFE_MISSING = "punsafe_missing"  # null or NaN: a missing score is a refusal
    PUNSAFE_HIGH = "punsafe_high"
    PWATERMARK_MISSING = "pwatermark_missing"
    PWATERMARK_HIGH = "pwatermark_high"
    SIMILARITY_LOW = "similarity_low"  # or missing, where a limit is set
    AESTHETIC_LOW = "aesthetic_low"  # or missing, where a limit is set
    SIDE_SMALL = "side_small"  # by the metadata; or missing
    ASPECT_EXTREME = "aspect_extreme"
    CAPTION_EMPTY = "caption_empty"
    CAPTION_LONG = "caption_long"
    DUPLICATE_ROW = "duplicate_row"  # the same url and caption as an earlier row
    DUPLICATE_URL = "duplicate_url"  # the same url as an earlier row, another caption
    # download
    URL_REFUSED = "url_refused"  # scheme, or an address that is not public and not allowed
    HOST_UNKNOWN = "host_unknown"  # the name does not resolve
    CONNECTION_FAILED = "connection_failed"
    TIMED_OUT = "timed_out"
    HTTP_CLIENT_ERROR = "http_client_error"  # 4xx
    HTTP_SERVER_ERROR = "http_server_error"  # 5xx
    OPTED_OUT = "opted_out"  # X-Robots-Tag: noai, noimageai, noindex, noimageindex
    EMPTY_FILE = "empty_file"
    NOT_AN_IMAGE = "not_an_image"  # HTML and the like
    IMAGE_TRUNCATED = "image_truncated"
    IMAGE_TOO_LARGE = "image_too_large"  # in pixels, by its header, before decoding
    IMAGE_TOO_SMALL = "image_too_small"
    IMAGE_BROKEN = "image_broken"  # the decoder gave up for another reason
    LOST_BY_DOWNLOADER = "lost_by_downloader"  # img2dataset said nothing about the row
    DOWNLOAD_FAILED = "download_failed"  # img2dataset's message fits none of the above
    # encode
    DUPLICATE_IMAGE = "duplicate_image"  # the same bytes as another row's picture
    IMAGE_UNREADABLE = "image_unreadable"
    NON_FINITE = "non_finite"  # NaN or infinity out of an encoder
