// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {ComputeEscrow} from "../src/ComputeEscrow.sol";
import {JobLane} from "../src/JobLane.sol";
import {SessionLane} from "../src/SessionLane.sol";
import {NodeRegistry} from "../src/NodeRegistry.sol";
import {ModelRegistry} from "../src/ModelRegistry.sol";
import {ProofHub} from "../src/ProofHub.sol";
import {TestToken} from "./TestToken.sol";

/// @dev The cheat codes that these tests use.
interface Vm {
    function readFile(string calldata path) external view returns (string memory);
    function parseJsonBytes(string calldata json, string calldata key) external pure returns (bytes memory);
    function addr(uint256 key) external pure returns (address);
    function sign(uint256 key, bytes32 digest) external pure returns (uint8 v, bytes32 r, bytes32 s);
    function prank(address sender) external;
    function deal(address who, uint256 wei_) external;
    function etch(address who, bytes calldata code) external;
    function signAndAttachDelegation(address implementation, uint256 key) external;
    function warp(uint256 timestamp) external;
    function chainId(uint256 id) external;
    function expectRevert(bytes calldata data) external;
    function expectPartialRevert(bytes4 selector) external;
    function getNonce(address who) external view returns (uint64);
    function snapshotState() external returns (uint256 id);
    function revertToState(uint256 id) external returns (bool);
    function computeCreateAddress(address deployer, uint256 nonce) external pure returns (address);
}

/// @dev Deploys the committed artifacts and offers one of each party.
abstract contract Base {
    Vm internal constant vm = Vm(address(uint160(uint256(keccak256("hevm cheat code")))));
    uint128 internal constant MIN_STAKE = 1 ether;
    uint64 internal constant EXIT_DELAY = 7 days;
    address internal constant OWNER = address(0xA11CE);

    NodeRegistry internal nodes;
    ModelRegistry internal models;
    ProofHub internal proofs;
    ComputeEscrow internal escrow;
    TestToken internal token;

    uint256 internal constant CLIENT_KEY = 0xC11E47;
    uint256 internal constant HOT_KEY = 0x407;
    uint256 internal constant HOT2_KEY = 0x408;
    address internal client;
    address internal hot;
    address internal hot2;
    address internal constant PAYOUT = address(0xCA5);
    address internal constant PAYOUT2 = address(0xCA6);
    address internal constant ANYONE = address(0xA7);

    function deployAll() internal {
        vm.warp(1_800_000_000);
        models = ModelRegistry(create_("ModelRegistry", abi.encode(OWNER)));
        proofs = ProofHub(create_("ProofHub", abi.encode(OWNER)));
        address predicted = vm.computeCreateAddress(address(this), vm.getNonce(address(this)) + 1);
        nodes = NodeRegistry(create_("NodeRegistry", abi.encode(predicted, MIN_STAKE, EXIT_DELAY)));
        escrow = ComputeEscrow(payable(create_("ComputeEscrow", abi.encode(nodes, proofs, OWNER))));
        require(address(escrow) == predicted, "escrow is not where the registry expects it");
        token = new TestToken();
        client = vm.addr(CLIENT_KEY);
        hot = vm.addr(HOT_KEY);
        hot2 = vm.addr(HOT2_KEY);
        vm.deal(client, 1000 ether);
        token.transfer(client, 500_000e6);
        vm.prank(client);
        token.approve(address(escrow), type(uint256).max);
        registerNode(hot, PAYOUT);
        registerNode(hot2, PAYOUT2);
    }

    function registerNode(address key, address payout) internal {
        vm.deal(key, 10 ether);
        string[] memory addrs = new string[](1);
        addrs[0] = "/ip4/192.0.2.1/udp/4001/quic-v1";
        vm.prank(key);
        nodes.register{value: 5 ether}(payout, hex"0024080112", keccak256("record"), addrs);
    }

    function create_(string memory name, bytes memory args) internal returns (address made) {
        bytes memory code = vm.parseJsonBytes(vm.readFile(string.concat("artifacts/", name, ".json")), ".bytecode");
        code = bytes.concat(code, args);
        assembly ("memory-safe") {
            made := create(0, add(code, 32), mload(code))
        }
        require(made != address(0), string.concat(name, " was not created"));
    }

    function sign(uint256 key, bytes32 digest) internal pure returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, digest);
        return abi.encodePacked(r, s, v);
    }

    function sessionTerms(address token_, uint128 deposit, bytes32 nonce)
        internal
        view
        returns (SessionLane.SessionTerms memory t)
    {
        t.host = hot;
        t.client = client;
        t.modelId = keccak256("model");
        t.token = token_;
        t.deposit = deposit;
        t.priceInPerMTok = 100;
        t.priceOutPerMTok = 400;
        t.expiry = uint64(block.timestamp) + 1 hours;
        t.settleWindowSecs = 10 minutes;
        t.offerValidUntil = uint64(block.timestamp) + 60;
        t.nonce = nonce;
    }

    function jobTerms(address token_, uint128 maxAmount) internal view returns (JobLane.JobTerms memory t) {
        t.modelId = keccak256("model");
        t.token = token_;
        t.maxAmount = maxAmount;
        t.priceInPerMTok = 1_000_000;
        t.priceOutPerMTok = 3_000_000;
        t.maxInTokens = 1000;
        t.maxOutTokens = 1000;
        t.claimBy = uint64(block.timestamp) + 1 hours;
        t.deliverSecs = 300;
        t.proveSecs = 600;
        t.challengeSecs = 900;
        t.resolveSecs = 1200;
        t.maxAttempts = 2;
        t.hostBond = 0.5 ether;
        t.challengeBond = 0.2 ether;
    }

    function eq(uint256 a, uint256 b, string memory what) internal pure {
        if (a != b) revert(string.concat(what, ": ", str(a), " is not ", str(b)));
    }

    function yes(bool ok, string memory what) internal pure {
        require(ok, what);
    }

    function str(uint256 n) internal pure returns (string memory) {
        if (n == 0) return "0";
        bytes memory out;
        for (; n != 0; n /= 10) out = bytes.concat(bytes1(uint8(48 + n % 10)), out);
        return string(out);
    }
}
