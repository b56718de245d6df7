"""Makes a bucket where it is not there yet: ``python make_bucket.py NAME``; endpoint and keys as boto3 finds them."""

import logging
import sys

import boto3
from botocore.exceptions import ClientError

LOGGER = logging.getLogger(__name__)


def make_bucket(name: str) -> bool:
    """Makes a bucket.

    Args:
        name: Of the bucket.

    Returns:
        Whether it was made now.

    Raises:
        ClientError: It is there and not ours, or must not be made.
    """
    client = boto3.client("s3")
    try:
        client.head_bucket(Bucket=name)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
        client.create_bucket(Bucket=name)
        return True
    return False


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    LOGGER.setLevel(logging.INFO)
    made = make_bucket(sys.argv[1])
    LOGGER.info("s3://%s: %s", sys.argv[1], "made" if made else "is there")
