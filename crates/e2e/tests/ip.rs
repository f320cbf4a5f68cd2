//! `twill ip calc` and `twill ip plan`, as a user meets them.

use std::process::Command;

use twill_e2e::bin;

fn twill(line: &str) -> (i32, String, String) {
    let out = Command::new(bin("twill")).args(line.split_whitespace()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (out.status.code().unwrap(), text(&out.stdout), text(&out.stderr))
}

#[test]
fn calc_shows_the_example_of_the_basics() {
    let (code, out, _) = twill("ip calc 129.5.1.1");
    let want = "\
address            129.5.1.1
class              B (default mask 255.255.0.0)
network            129.5.0.0 (/16, length assumed)
host part          0.0.1.1
broadcast          129.5.255.255
mask               255.255.0.0
wildcard           0.0.255.255
hosts              129.5.0.1 to 129.5.255.254, 65534 of them
addresses          65536
network | host     10000001.00000101 | 00000001.00000001
";
    assert_eq!((code, out.as_str()), (0, want));
}

#[test]
fn calc_knows_ipv6() {
    let (code, out, _) = twill("ip calc fd00:15::2/64 -o json");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &json["schema"]), (0, &serde_json::json!(1)));
    assert_eq!(json["network"], "fd00:15::/64");
    assert_eq!((json["class"].is_null(), json["broadcast"].is_null()), (true, true));
    assert_eq!(json["addresses"], "18446744073709551616");
}

#[test]
fn what_is_no_address_is_a_usage_error_with_a_code() {
    let (code, out, err) = twill("ip calc 129.5.1 -o json");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &json["error"]["code"]), (2, &serde_json::json!("bad-address")));
    assert!(err.starts_with("error: \"129.5.1\" is not an address like"), "{err}");
}

#[test]
fn plan_prints_a_config_or_the_network_that_would_do() {
    let (code, out, _) = twill("ip plan --network 10.244.0.0/16 --nodes 100 --containers 50 -o json");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &json["subnet_length"]), (0, &serde_json::json!(24)));
    assert_eq!(json["config"], r#"{"Network":"10.244.0.0/16","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#);
    let (code, _, err) = twill("ip plan --network 10.244.0.0/20 --nodes 100 --containers 200");
    assert_eq!(code, 1);
    assert!(err.contains("hint: take a /17, such as --network 10.244.0.0/17"), "{err}");
    let (code, ..) = twill("ip plan --network 10.244.0.0/17 --nodes 100 --containers 200");
    assert_eq!(code, 0, "the hint holds");
    // Around it there is none that containers can be in.
    let (code, _, err) = twill("ip plan --network 10.0.0.0/8 --nodes 99999999 --containers 5");
    assert!(code == 1 && err.contains("/2 or larger") && err.contains("hint: take fewer nodes or containers"), "{err}");
}
