def test_up(kubectl, namespace):
    print(kubectl("get", "ns").stdout)
