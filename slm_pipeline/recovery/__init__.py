import logging

# peft imports it where it is installed; on a processor it then asks for a package that is fetched from the hub
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
