"""The programs: command lines over the package, behind launch/, data_tools/ and the console scripts."""
